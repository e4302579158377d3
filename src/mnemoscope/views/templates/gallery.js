"use strict";
(() => {
  const table = document.getElementById("neurons"), body = table.tBodies[0];
  const rows = [...body.rows], field = document.getElementById("filter"), said = document.getElementById("shown");
  const buttons = [...document.querySelectorAll(".filter button")];
  let criterion = "";
  const scores = new Map(rows.map((row) => [row, new Map(row.dataset.why.split(" ").map((pair) => pair.split(":")))]));
  const show = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !(words.every((word) => text.includes(word)) && (!criterion || scores.get(row).has(criterion)));
      count += !row.hidden;
    }
    said.textContent = `${count} of ${rows.length}`;
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
  document.querySelector(".filter").hidden = false;
  show();
})();
