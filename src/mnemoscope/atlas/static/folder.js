// What the pages of a folder do in the browser: they read a neuron's card, or the neurons that promote a token, by its range of bytes.
import { keys, style } from "./page.js";

const root = document.body.dataset.root, place = document.getElementById("filled"), told = document.querySelector(".told");
style(document);
keys({
  l: () => document.querySelector("[data-layer]")?.dataset.layer ?? `${root}layers/${document.body.dataset.first}.html`,
  h: () => `${root}index.html`,
});

const kilobytes = (bytes) => `${Math.max(1, Math.round(bytes / 1000)).toLocaleString("en")} kB`;
const json = async (file) => {
  const answer = await fetch(root + file);
  if (!answer.ok) throw new Error(`${file}: the server answers ${answer.status}`);
  return answer.json();
};

// one block of a file: its range, or of a server that knows no ranges the whole file
const block = async (name, number) => {
  const begins = await json(`${name}.json`), [start, stop] = begins.slice(number, number + 2);
  const answer = await fetch(`${root}${name}.pack`, { headers: { Range: `bytes=${start}-${stop - 1}` } });
  if (!answer.ok) throw new Error(`${name}.pack: the server answers ${answer.status}`);
  let bytes = await answer.arrayBuffer();
  if (answer.status !== 206) {
    told.textContent = `Slower than it could be: this server sends whole files (here ${kilobytes(bytes.byteLength)}) where ${kilobytes(stop - start)} were asked for. One that answers ranges is quicker, such as mnemoscope serve --static.`;
    bytes = bytes.slice(start, stop);
  }
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
};

const element = (tag, text, ...inside) => {
  const made = Object.assign(document.createElement(tag), { textContent: text });
  made.append(...inside);
  return made;
};
const link = (address) => Object.assign(element("a", address), { className: "neuron", href: `${root}neuron.html?q=${address}` });

const neuron = async (address, site) => {
  const [layer, expert, given] = address.map((text) => text && Number(text));
  const experts = site.experts[layer]?.[0] ? site.experts[layer] : null;
  const number = expert === undefined ? given : experts ? expert * experts[1] + given : NaN;
  if (!(number < site.layers[layer])) {
    told.textContent = `There is no such neuron: the run has layers 0 to ${site.layers.length - 1}${layer < site.layers.length ? `, and layer ${layer} has ${site.layers[layer].toLocaleString("en")} neurons` : ""}.`;
    return;
  }
  const cards = await block(`cards/${layer}`, Math.floor(number / site.block));
  place.innerHTML = cards[number % site.block]; // made by the templates that the server uses, text escaped
  for (const term of place.querySelectorAll(".mn-term")) term.title = document.getElementById(term.getAttribute("popovertarget")).lastChild.textContent.trim(); // under the mouse, too
  style(place);
  document.title = document.title.replace(/^neuron/, place.querySelector("h1").textContent);
};

const search = async (text, site) => {
  const box = place.querySelector("input"), list = place.querySelector("datalist");
  box.value = text;
  const [names, spelled] = [await block("tokens/names", 0), new Map()];
  names.forEach((name, token) => name && spelled.set(name, [...(spelled.get(name) ?? []), token]));
  box.addEventListener("input", () => {
    const near = box.value ? [...spelled.keys()].filter((name) => name.startsWith(box.value)) : [];
    near.sort((a, b) => a.length - b.length);
    list.replaceChildren(...near.slice(0, 8).map((value) => Object.assign(document.createElement("option"), { value })));
  });
  if (!text) return;
  if (!spelled.has(text)) {
    const near = [...spelled.keys()].filter((name) => name.trim().toLowerCase() === text.trim().toLowerCase());
    place.append(element("p", `The vocabulary has no token ${JSON.stringify(text)}${near.length ? `; it has ${near.map((name) => JSON.stringify(name)).join(", ")}` : ""}.`));
    return;
  }
  for (const token of spelled.get(text)) {
    const [count, ...rows] = (await block("tokens/promotes", Math.floor(token / site.tokens)))[token % site.tokens];
    place.append(element("p", `${count.toLocaleString("en")} lists (one for each neuron and sign) have ${JSON.stringify(text)}${rows.length < count ? `; the first ${rows.length}` : ""}.`));
    const cell = (tag, value) => Object.assign(element(tag, value), { className: typeof value === "number" || ["rank", "logit"].includes(value) ? "n" : "" });
    const line = (tag, first, ...values) => element("tr", "", first, ...values.map((value) => cell(tag, value)));
    const table = element("table", "", element("thead", "", line("th", cell("th", "neuron"), "sign", "usual", "rank", "logit")));
    table.className = "wide";
    table.append(element("tbody", "", ...rows.map(([address, sign, usual, rank, logit]) =>
      line("td", element("td", "", link(address)), sign > 0 ? "+" : "-", usual ? "yes" : "no", rank, logit))));
    place.append(table);
  }
};

if (place) try {
  const text = new URLSearchParams(location.search).get("q") ?? "", address = /^\s*L(\d+)(?:E(\d+))?N(\d+)\s*$/i.exec(text);
  const wanted = address ? "neuron" : "search";
  if (wanted === place.dataset.fill) await (address ? neuron(address.slice(1), await json("site.json")) : search(text, await json("site.json")));
  else location.replace(`${root}${wanted}.html?q=${encodeURIComponent(text)}`);
} catch (error) {
  told.textContent = `This cannot be shown: ${error.message}`;
}
