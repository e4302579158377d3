// What of a page is cut with nothing to say so or cannot be scrolled by keys, leaves its picture or has letters too small there, lies in a
// picture beyond the page, or is written over another text.
() => {
  const found = { wide: document.documentElement.scrollWidth - innerWidth, cut: [], left: [], small: [], beyond: [], over: [] };
  const named = (element) => `${element.tagName}.${element.getAttribute("class") ?? ""}: ${element.textContent.trim().slice(0, 40)}`;
  const clips = (element) => getComputedStyle(element).overflowX !== "visible" && element.tagName !== "svg";
  for (const element of document.querySelectorAll("body *:not(svg, svg *)")) {
    const style = getComputedStyle(element);
    if (!clips(element) || element.scrollWidth <= element.clientWidth + 1) continue;
    const shadows = element.classList.contains("mn-scroll") && style.backgroundAttachment.includes("local");
    if (!shadows && style.textOverflow !== "ellipsis" && style.maskImage === "none") found.cut.push(named(element));
    if (shadows && element.tabIndex < 0) found.cut.push(`no keys: ${named(element)}`);
  }
  for (const svg of document.querySelectorAll("svg")) {
    const place = svg.closest(".mn-scroll");
    if ((!place || !clips(place)) && svg.getBoundingClientRect().right > innerWidth + 1) found.beyond.push(named(svg));
  }
  for (const text of document.querySelectorAll("svg text")) {
    const drawn = text.getScreenCTM(), letters = parseFloat(getComputedStyle(text).fontSize) * (drawn ? Math.hypot(drawn.a, drawn.b) : 1);
    if (text.getBoundingClientRect().width && letters < 8) found.small.push(`${letters.toFixed(1)} px: ${named(text)}`);
    const svg = text.ownerSVGElement, box = text.getBoundingClientRect(), room = svg.getBoundingClientRect();
    if (!box.width || getComputedStyle(svg).overflow === "visible") continue;
    if (box.left < room.left - 1 || box.right > room.right + 1 || box.top < room.top - 2 || box.bottom > room.bottom + 2) found.left.push(named(text));
  }
  const seen = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || ["STYLE", "SCRIPT", "title"].includes(element.tagName) || element.closest("svg")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const { left, right, top, bottom } of range.getClientRects()) {
      const box = { left, right, top, bottom, node };
      for (let above = element; above; above = above.parentElement) {
        if (!clips(above)) continue;
        const room = above.getBoundingClientRect();
        Object.assign(box, { left: Math.max(box.left, room.left), right: Math.min(box.right, room.right), top: Math.max(box.top, room.top), bottom: Math.min(box.bottom, room.bottom) });
      }
      if (box.right - box.left > 2 && box.bottom - box.top > 2) seen.push(box);
    }
  }
  seen.sort((a, b) => a.top - b.top);
  seen.forEach((a, k) => {
    for (let other = k + 1; other < seen.length && seen[other].top < a.bottom - 4; other += 1) {
      const b = seen[other];
      if (a.node !== b.node && Math.min(a.right, b.right) - Math.max(a.left, b.left) > 3 && Math.min(a.bottom, b.bottom) - b.top > 4) {
        found.over.push(`${a.node.data.trim().slice(0, 30)} / ${b.node.data.trim().slice(0, 30)}`);
      }
    }
  });
  return found;
}
