// Elements and numbers. Nothing here or elsewhere on the page parses HTML: text stays text.

const SVG = "http://www.w3.org/2000/svg";
let ids = 0;

/** An HTML element. Attributes that are null or false are left out; `onclick` and the like are listeners. */
export const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

/** An SVG element. */
export const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

/** An id that no other element has. */
export const fresh = (name) => `${name}-${++ids}`;

export const $ = (selector) => document.querySelector(selector);

/** 0.639 as "64 %". What rounds to 0 or 100 and is neither says so. */
export function percent(p) {
  if (p > 0 && p < 0.005) return "< 1 %";
  if (p < 1 && p >= 0.995) return "> 99 %";
  return `${Math.round(100 * p)} %`;
}

/** An interval of a probability: "21 to 93 %". */
export const between = ([low, high]) => `${Math.round(100 * low)} to ${Math.round(100 * high)} %`;

/** A number with three digits behind the point. */
export const exact = (x) => (x === null || x === undefined ? "" : x.toFixed(3));

/** An entropy: "0.23 nats". */
export const nats = (x) => `${Math.max(x, 0).toFixed(2)} nats`;

/** A value of an answer for people: its leading space is part of it, but not of the picture. */
export const shown = (value) => String(value).trim() || JSON.stringify(value);

/** A table; the first cell of a row is its head. */
export function table(caption, heads, rows) {
  return h("div", { class: "scroll", role: "group", "aria-label": caption, tabindex: 0 },
    h("table", {},
      h("caption", {}, caption),
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, rows.map(([first, ...rest]) =>
        h("tr", {}, h("th", { scope: "row" }, first), rest.map((cell) => h("td", {}, cell)))))));
}

/** The same, behind a button. */
export const asTable = (caption, heads, rows) =>
  h("details", { class: "table" }, h("summary", {}, "As a table"), table(caption, heads, rows));

/** Does `work` while the form's button waits; what fails is said below the form. */
export async function working(form, saying, work) {
  const button = form.querySelector("button");
  const said = form.querySelector(".said");
  if (button.getAttribute("aria-disabled") === "true") return;
  button.setAttribute("aria-disabled", "true"); // a disabled button would lose the focus
  said.className = "said";
  said.textContent = saying;
  try {
    said.textContent = (await work()) ?? "";
  } catch (error) {
    said.className = "said trouble";
    said.textContent = error.name === "AbortError" ? "Stopped." : error.message;
  } finally {
    button.removeAttribute("aria-disabled");
  }
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** The three parts of an entropy as cells. */
export const split3 = (entropy) => (entropy ? [entropy.total, entropy.aleatoric, entropy.epistemic].map(exact) : ["", "", ""]);
