"use strict";
(() => {
  const table = document.getElementById("neurons"), body = table.tBodies[0];
  const rows = [...body.rows], field = document.getElementById("filter");
  const said = document.getElementById("shown"), hint = document.getElementById("hint");
  const buttons = [...document.querySelectorAll(".filter button")];
  const layers = Number(table.dataset.layers), sizes = table.dataset.neurons.split(",").map(Number);
  const size = (layer) => (sizes.length > 1 ? sizes[layer] : sizes[0]);
  const name = (row) => row.cells[0].textContent.trim();
  const folds = new Map([...document.querySelectorAll(".fold")].map((fold) => [fold.dataset.neuron, fold]));
  const scores = new Map(rows.map((row) => [row, new Map(row.dataset.why.split(" ").map((pair) => pair.split(":")))]));
  const texts = new Map();
  let criterion = "";

  // what a row and its card say; spaces of tokens are shown as dots, and are found as spaces
  const text = (row) => {
    if (!texts.has(row)) texts.set(row, `${row.textContent} ${folds.get(name(row)).textContent}`.replaceAll("·", " ").toLowerCase());
    return texts.get(row);
  };
  const address = (query) => {
    const found = /^(?:l(\d+)n|(\d+)[./_ ])(\d+)$/i.exec(query);
    return found && { layer: Number(found[1] ?? found[2]), neuron: Number(found[3]) };
  };
  const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`);
  const line = (...parts) => {
    hint.replaceChildren(...parts.map((part, k) => (k % 2 ? Object.assign(document.createElement("code"), { textContent: part }) : part)));
    hint.hidden = false;
  };
  const advise = (query, wanted, count) => {
    const run = table.dataset.run;
    if (!query) hint.hidden = true;
    else if (!wanted) {
      line(`${count ? "" : `None of these ${rows.length} cards says “${query}”. `}The whole run is searched by `,
        `mnemoscope find ${run} --promotes ${quoted(query)}`, " (what neurons write) and ",
        `mnemoscope find ${run} --trigger ${quoted(query)}`, " (what triggers them).");
    } else if (wanted.layer >= layers || wanted.neuron >= size(wanted.layer)) {
      const there = sizes.length > 1 && wanted.layer < layers
        ? `layer ${wanted.layer} has ${size(wanted.layer)} neurons`
        : `the run has layers 0 to ${layers - 1}${sizes.length > 1 ? "" : ` and neurons 0 to ${sizes[0] - 1}`}`;
      line(`There is no such neuron: ${there}.`);
    } else if (count) hint.hidden = true;
    else line("This neuron was not chosen for the page. It is shown by ", `mnemoscope show ${run} L${wanted.layer}N${wanted.neuron}`, ".");
  };
  const show = () => {
    const query = field.value.trim(), wanted = address(query);
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = wanted ? (row) => name(row) === `L${wanted.layer}N${wanted.neuron}` : (row) => words.every((word) => text(row).includes(word));
    let count = 0;
    for (const row of rows) {
      row.hidden = !((!words.length || fits(row)) && (!criterion || scores.get(row).has(criterion)));
      folds.get(name(row)).hidden = row.hidden;
      count += !row.hidden;
    }
    for (const layer of document.querySelectorAll(".layer")) layer.hidden = !layer.querySelector(".fold:not([hidden])");
    said.textContent = `${count} of ${rows.length}`;
    advise(query, wanted, count);
  };
  const unfold = () => {
    const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const fold = card?.closest(".fold");
    if (!fold) return;
    if (fold.hidden) {
      field.value = "";
      buttons[0].click();
    }
    fold.open = true;
    card.scrollIntoView();
  };
  field.addEventListener("input", show);
  for (const button of buttons) button.addEventListener("click", () => {
    criterion = button.value;
    for (const other of buttons) other.setAttribute("aria-pressed", other === button);
    for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
    const score = (row) => (criterion ? Number(scores.get(row).get(criterion) ?? -Infinity) : -rows.indexOf(row));
    body.append(...[...rows].sort((a, b) => score(b) - score(a)));
    show();
  });
  for (const head of table.tHead.rows[0].cells) head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending", at = head.cellIndex;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[at].dataset.key;
    const numeric = rows.every((row) => key(row) === "" || !Number.isNaN(Number(key(row))));
    // what is not defined has an empty key and comes last either way
    const sorted = [...rows].sort((a, b) => (key(a) === "") - (key(b) === "")
      || (down ? -1 : 1) * (numeric ? key(a) - key(b) : key(a).localeCompare(key(b))));
    body.append(...sorted);
  });
  addEventListener("hashchange", unfold);
  document.querySelector(".filter").hidden = false;
  show();
  unfold();
})();
