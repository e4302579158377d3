// What every page does in the browser, served or from a folder: styles that the policy lets only a script set, and keys.
import "./tools.js";

export const style = (place) => {
  for (const element of place.querySelectorAll("[data-style]")) {
    element.style.cssText = element.dataset.style;
    element.removeAttribute("data-style");
  }
  for (const text of place.querySelectorAll(".mn-text > div")) if (text.scrollWidth > text.clientWidth) text.tabIndex = 0; // what scrolls can be reached by keys
};

// after: of each letter that may follow g, what gives the address it leads to
export const keys = (after) => {
  const help = document.querySelector("dialog.keys");
  const follow = (selector) => {
    const link = document.querySelector(selector);
    if (link) location.href = link.href;
  };
  const plain = window.keysOfPage = { // a page with more keys adds them
    "/": () => { const box = document.querySelector(".go input"); box.focus(); box.select(); },
    "?": () => help.showModal(),
    j: () => follow("[rel=next]"),
    k: () => follow("[rel=prev]"),
  };
  let begun = -Infinity;
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input:not([type=checkbox]), textarea, select, dialog[open]")) return; // what closed keeps the focus until the next frame
    if (event.key === "Enter" && event.target.closest("a, button, summary")) return;
    const wanted = event.timeStamp - begun < 1500 ? after[event.key] && (() => { location.href = after[event.key](); }) : plain[event.key];
    begun = event.key === "g" ? event.timeStamp : -Infinity;
    if (wanted) {
      event.preventDefault();
      wanted();
    }
  });
  document.querySelector(".help")?.addEventListener("click", () => help.showModal());
};

// -- the page as one file ----------------------------------------------------------------------------------------
const GONE = "script, link, nav, form, dialog, noscript, template, .skip, .pages, .live, .tools, #preview, [hidden]";
const whole = async () => {
  const sheets = [...document.querySelectorAll("link[rel=stylesheet]")].map(async (link) => (await fetch(link.href)).text());
  const page = document.documentElement.cloneNode(true), note = document.querySelector(".note textarea")?.value;
  if (note) page.querySelector(".note").replaceWith(Object.assign(document.createElement("p"), { className: "said", textContent: note }));
  for (const element of page.querySelectorAll(`${GONE}, meta[http-equiv]`)) element.remove();
  for (const element of page.querySelectorAll("*")) for (const name of Object.keys(element.dataset)) delete element.dataset[name]; // addresses, which may hold the server's secret
  for (const link of page.querySelectorAll("a[href]:not([href^='#'])")) link.removeAttribute("href"); // nobody answers there
  const policy = Object.assign(document.createElement("meta"), { httpEquiv: "Content-Security-Policy", content: "default-src 'none'; style-src 'unsafe-inline'; img-src data:" });
  page.querySelector("meta").after(policy);
  page.querySelector("head").append(Object.assign(document.createElement("style"), { textContent: (await Promise.all(sheets)).join("\n") }));
  const from = Object.assign(document.createElement("p"), { className: "lead", textContent: `Saved by mnemoscope from ${decodeURIComponent(location.pathname).replace(/^.*?(?=\/runs\/)/, "")}${location.search}` });
  page.querySelector("main").append(from);
  return new Blob(["<!doctype html>\n", page.outerHTML], { type: "text/html" });
};
document.querySelector(".save")?.addEventListener("click", async () => {
  const name = document.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(await whole()), download: `${name}.html` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
});
