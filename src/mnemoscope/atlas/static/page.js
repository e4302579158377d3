// What every page does in the browser, served or from a folder: styles that the policy lets only a script set, and keys.
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
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input:not([type=checkbox]), textarea, select, dialog")) return;
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
