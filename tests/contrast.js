// The texts of a page that stand out too little from what is painted behind them: composited, as the browser shows it.
([least, within]) => {
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const known = new Map();
  const parse = (colour) => {
    if (!known.has(colour)) {
      context.clearRect(0, 0, 1, 1);
      context.fillStyle = colour;
      context.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
      known.set(colour, [r, g, b, a / 255]);
    }
    return known.get(colour);
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((value, k) => value * a + below[k] * (1 - a));
  const opacity = (element) => (element ? Number(getComputedStyle(element).opacity) * opacity(element.parentElement) : 1);
  const faded = (colour, factor) => [...colour.slice(0, 3), colour[3] * factor];
  const painted = (element) => {
    const style = getComputedStyle(element);
    if (!(element instanceof SVGElement) || element.tagName === "svg") return faded(parse(style.backgroundColor), opacity(element));
    if (["text", "g", "a", "tspan"].includes(element.tagName) || style.fill === "none") return [0, 0, 0, 0];
    return faded(parse(style.fill), Number(style.fillOpacity) * opacity(element));
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((value) => value / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = { texts: 0, pictures: 0, weak: [] };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!element.closest(within)) continue;
    if (!node.data.trim() || ["STYLE", "SCRIPT", "title"].includes(element.tagName) || style.visibility !== "visible") continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = element instanceof SVGElement ? element.getBoundingClientRect() : range.getClientRects()[0];
    if (!box || box.width < 2 || box.height < 2) continue;
    const x = box.x + box.width / 2, y = box.y + box.height / 2;
    const stack = document.elementsFromPoint(x, y);
    const own = stack.findIndex((other) => other === element || element.contains(other) || other.contains(element));
    if (own < 0) continue;
    let ground = [255, 255, 255];
    const scheme = getComputedStyle(document.documentElement).colorScheme;
    if (scheme.includes("dark") && matchMedia("(prefers-color-scheme: dark)").matches) ground = [18, 18, 18];
    for (const other of stack.slice(own).reverse()) ground = over(painted(other), ground);
    const colour = element instanceof SVGElement
      ? faded(parse(style.fill), Number(style.fillOpacity) * opacity(element)) : faded(parse(style.color), opacity(element));
    const [a, b] = [light(over(colour, ground)), light(ground)].sort((p, q) => q - p);
    const ratio = (a + 0.05) / (b + 0.05);
    found.texts += 1;
    found.pictures += element instanceof SVGElement;
    if (ratio < least) found.weak.push(`${node.data.trim().slice(0, 30)} | ${ratio.toFixed(2)} | ${style.color} ${style.fill} on ${ground.map(Math.round)}`);
  }
  return found;
}
