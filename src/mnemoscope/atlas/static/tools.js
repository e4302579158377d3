// What can be taken from a page: a table as text or CSV, a picture as SVG, a command as text. One small bar, beside what is pointed at or has the focus.
const WHAT = "main table, main figure svg, main svg.mn-graph, main svg.mn-attention, main pre, main code";
const LOOK = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity", "opacity", "font-family", "font-size", "font-weight", "text-anchor"];

const cells = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => cell.innerText.replace(/\s+/g, " ").trim().replace(/(?<=\w)\?$/, "")));
const csv = (table) => cells(table).map((row) => row.map((cell) => (/[",\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell)).join(",")).join("\n");
const tsv = (table) => cells(table).map((row) => row.join("\t")).join("\n");

// the picture by itself, in the colours that it has here
const picture = (svg) => {
  const copy = svg.cloneNode(true), inside = [svg, ...svg.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((element, k) => {
    const look = getComputedStyle(inside[k]);
    if (!["title", "a", "g"].includes(element.localName)) for (const name of LOOK) element.setAttribute(name, look.getPropertyValue(name));
    for (const name of ["class", "href", "tabindex"]) element.removeAttribute(name);
    for (const name of Object.keys(element.dataset)) delete element.dataset[name];
  });
  const box = svg.viewBox.baseVal, ground = document.createElementNS(svg.namespaceURI, "rect");
  for (const [name, value] of Object.entries({ x: box.x, y: box.y, width: box.width, height: box.height, fill: getComputedStyle(document.body).backgroundColor })) ground.setAttribute(name, value);
  copy.prepend(ground);
  return new XMLSerializer().serializeToString(copy);
};

const copied = async (text) => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = Object.assign(document.createElement("textarea"), { value: text }); // where the address is not this machine's
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
};
const saved = (text, type, ending) => {
  const name = document.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([text], { type })), download: `${name}.${ending}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
};

const bar = Object.assign(document.createElement("div"), { className: "tools", hidden: true });
bar.setAttribute("role", "group");
let of = null, wait = 0;
const hide = () => { bar.hidden = true; of = null; };
const button = (name, said, does) => {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent: name, ariaLabel: said });
  made.addEventListener("click", async () => {
    await does();
    made.textContent = "✓";
    setTimeout(() => { made.textContent = name; }, 1200);
  });
  return made;
};
const show = (element) => {
  clearTimeout(wait);
  if (element === of) return;
  of = element;
  const kind = element.localName;
  bar.replaceChildren(...(kind === "table"
    ? [button("copy", "copy the table", () => copied(tsv(element))), button("CSV", "the table as CSV", () => saved(csv(element), "text/csv", "csv"))]
    : kind === "svg" ? [button("SVG", "the picture as SVG", () => saved(picture(element), "image/svg+xml", "svg"))]
    : [button("copy", "copy the text", () => copied(element.innerText))]));
  bar.setAttribute("aria-label", kind === "table" ? "take this table" : kind === "svg" ? "take this picture" : "take this text");
  const place = element.closest(".mn-scroll, .scroll, figure") ?? element;
  (place.tabIndex === 0 ? place : place.closest("p, pre, figure") ?? place).after(bar); // so that the next tab reaches it
  bar.hidden = false;
  const at = place.getBoundingClientRect(), frame = (bar.offsetParent === document.body ? document.documentElement : bar.offsetParent).getBoundingClientRect();
  const left = Math.min(at.right, document.documentElement.clientWidth - 8) - bar.offsetWidth - frame.left;
  bar.style.left = `${Math.max(0, left)}px`;
  bar.style.top = `${at.top - frame.top - (kind === "code" ? bar.offsetHeight + 2 : 0)}px`;
};
const taken = (target) => target.closest?.(WHAT) ?? (target.matches?.(".mn-scroll, .scroll") ? target.querySelector("table, svg") : null);
for (const kind of ["pointerover", "focusin"]) addEventListener(kind, (event) => {
  if (event.target.closest?.(".tools")) return clearTimeout(wait);
  const element = taken(event.target);
  if (element) return show(element);
  clearTimeout(wait);
  if (of) wait = setTimeout(hide, 400); // time enough to get to the bar
});
addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
