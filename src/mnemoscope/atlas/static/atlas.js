// What the pages of a served run do in the browser: completions, parts that come later, and answers as they come.
import { keys, style } from "./page.js";

const run = document.body.dataset.run;
style(document);

// -- parts of a page that take longer than the rest --------------------------------------------------------------
for (const part of document.querySelectorAll("[data-part]")) fetch(part.dataset.part).then(async (answer) => {
  const whole = answer.ok && new DOMParser().parseFromString(await answer.text(), "text/html").getElementById(part.id);
  if (!whole) return;
  style(whole);
  part.replaceWith(whole);
});

if (run) keys({
  l: () => { const card = document.querySelector("[data-layer]"); return card ? card.dataset.layer : `${run}/layers/${document.body.dataset.first}`; },
  h: () => run,
  e: () => `${run}/explain`,
  a: () => `${run}/annotate`,
});

// -- completions -----------------------------------------------------------------------------------------------
const list = document.getElementById("completions");
let asked = "";
for (const field of document.querySelectorAll("[list=completions]")) field.addEventListener("input", async () => {
  const text = field.value;
  asked = text;
  const answer = await fetch(`${run}/completions.json?q=${encodeURIComponent(text)}`);
  if (!answer.ok || asked !== text) return; // another letter was typed meanwhile
  list.replaceChildren(...(await answer.json()).map((word) => Object.assign(document.createElement("option"), { value: word })));
});

// -- a small card where a neuron is named ----------------------------------------------------------------------
const preview = Object.assign(document.createElement("div"), { id: "preview", className: "mn preview", role: "tooltip", hidden: true });
document.getElementById("main").append(preview);
const cards = new Map();
let named = null, wait = 0; // the link whose card is shown or to come
const hide = () => {
  clearTimeout(wait);
  named?.removeAttribute("aria-describedby");
  named = null;
  preview.hidden = true;
};
const put = (link) => {
  const at = link.getBoundingClientRect(), size = preview.getBoundingClientRect();
  const below = at.bottom + 6 + size.height < innerHeight || at.top < size.height;
  preview.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  preview.style.top = `${below ? at.bottom + 6 : at.top - size.height - 6}px`;
};
const announce = (link) => {
  if (link === named) return clearTimeout(wait);
  hide();
  named = link;
  wait = setTimeout(async () => {
    const url = `${new URL(link.getAttribute("href"), location).pathname}/preview`;
    if (!cards.has(url)) {
      const answer = await fetch(url).catch(() => null);
      cards.set(url, answer?.ok ? await answer.text() : "");
    }
    if (named !== link || !cards.get(url)) return;
    preview.innerHTML = cards.get(url);
    style(preview);
    preview.hidden = false;
    link.setAttribute("aria-describedby", preview.id);
    put(link);
  }, 350);
};
const naming = (event) => event.target.closest("a.neuron, .scatter a");
const later = () => {
  clearTimeout(wait);
  wait = setTimeout(hide, 200); // time enough to get to the card
};
addEventListener("pointerover", (event) => {
  if (event.pointerType === "touch") return;
  const link = naming(event);
  if (link) announce(link);
  else if (event.target.closest("#preview")) clearTimeout(wait);
  else if (named && !named.matches(":focus-visible")) later();
});
addEventListener("focusin", (event) => {
  const link = naming(event);
  if (link?.matches(":focus-visible")) announce(link);
  else if (named) hide();
});
addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
addEventListener("scroll", () => { if (!preview.hidden) hide(); }, { passive: true });

// -- a part of a layer's picture -------------------------------------------------------------------------------
const picture = document.querySelector(".scatter svg");
if (picture) {
  const chosen = picture.querySelector(".chosen"), form = document.querySelector("main form");
  const axes = ["x", "y"].map((name) => {
    const [column, ...numbers] = picture.dataset[name].split(" ");
    const [scale, low, high, start, length] = numbers.map(Number);
    return { column, value: (place) => scale * Math.sinh(low + ((place - start) / length) * (high - low)) };
  });
  const place = (event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
  let from = null;
  const ends = (to) => [[from.x, to.x], [from.y, to.y]].map((pair) => pair.sort((a, b) => a - b));
  picture.addEventListener("pointerdown", (event) => {
    if (event.button || event.pointerType === "touch" || event.target.closest("a")) return;
    from = place(event);
    picture.setPointerCapture(event.pointerId);
  });
  picture.addEventListener("pointermove", (event) => {
    if (!from) return;
    const [[left, right], [top, bottom]] = ends(place(event));
    chosen.removeAttribute("hidden");
    for (const [name, value] of Object.entries({ x: left, y: top, width: right - left, height: bottom - top })) chosen.setAttribute(name, value);
  });
  picture.addEventListener("pointerup", (event) => {
    if (!from) return;
    const parts = ends(place(event));
    from = null;
    chosen.setAttribute("hidden", "");
    if (parts.some(([low, high]) => high - low < 6)) return;
    const kept = [...form.querySelectorAll("[name=where]")].filter((field) => field.value && !axes.some((axis) => field.value.startsWith(axis.column)));
    for (const field of form.querySelectorAll("[name=where]")) if (!kept.includes(field)) field.remove();
    axes.forEach((axis, k) => {
      const values = parts[k].map(axis.value).sort((a, b) => a - b);
      [">=", "<="].forEach((sign, end) => form.prepend(Object.assign(document.createElement("input"),
        { name: "where", value: `${axis.column}${sign}${values[end].toPrecision(4)}` })));
    });
    form.submit();
  });
}

// -- answers of the model --------------------------------------------------------------------------------------
const live = document.querySelector("[data-live]");
if (live) {
  const told = live.querySelector(".told"), bar = live.querySelector("progress"), answer = document.querySelector(".answer");
  const source = new EventSource(`${location.pathname}/events${location.search}`);
  const end = (text, failed) => {
    source.close();
    told.textContent = text;
    bar.hidden = true;
    live.querySelector(".stop")?.remove();
    live.toggleAttribute("data-failed", failed);
    live.hidden = !text;
  };
  source.addEventListener("waiting", (event) => { told.textContent = `waiting; ${event.data} before`; });
  source.addEventListener("progress", (event) => {
    const step = JSON.parse(event.data);
    told.textContent = step.total ? `${step.stage}: ${step.done} of ${step.total} ${step.unit}` : step.stage;
    bar.hidden = !step.total;
    if (step.total) Object.assign(bar, { max: step.total, value: step.done });
  });
  source.addEventListener("answer", (event) => {
    answer.innerHTML = JSON.parse(event.data);
    style(answer);
    document.querySelector(".made").hidden = false;
    end("", false);
    if (location.hash) document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
  });
  source.addEventListener("failure", (event) => end(JSON.parse(event.data), true));
  source.onerror = () => end(source.readyState === EventSource.CLOSED ? "the server refused this, or is gone" : "the connection broke off", true);
  live.querySelector(".stop").addEventListener("click", () => end("stopped", false));
}
