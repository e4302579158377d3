// What the rules of a host would change in a fragment.
() => {
  const style = (one) => getComputedStyle(one), all = (what) => [...document.querySelectorAll(`.mn ${what}`)];
  const each = (what, name) => [...new Set(all(what).map((one) => style(one)[name]))];
  const light = (colour) => colour.match(/[\d.]+/g).slice(0, 3).reduce((sum, value) => sum + Number(value), 0) / 765;
  return {
    panels: all(".mn-card, .mn-explain > section").map((one) => light(style(one).backgroundColor)),
    rows: each("tr, .mn thead, .mn tbody, .mn tbody td:not(:first-child):not(.bar)", "backgroundColor"),
    numbers: each(".mn-numbers td:not(:first-child), .mn .mn-parts td:not(:first-child):not([colspan]):not(.tokens)", "textAlign"),
    names: each(".mn-numbers tbody th, .mn .mn-parts tbody td:first-child:not([colspan])", "textAlign"),
    terms: [...each("dl.mn-value", "display"), ...each("dt", "float"), ...each("dt", "fontWeight")],
    code: each("code", "backgroundColor"),
    sizes: [...each(".mn-numbers td", "fontSize"), ...each(".mn-numbers td", "paddingTop")],
  };
}
