// Pictures: bars with intervals, the split of an entropy, and a reliability diagram. Each has a table beside it.

import { asTable, between, exact, fresh, h, nats, percent, svg, table } from "./dom.js";

const MOST = 12; // bars of one picture; its table has all

/**
 * A bar for each item, with its interval as a line.
 *
 * items: [{name, probability, interval?, notes?: [text], extra?: [cell]}]; `extra` are further cells of the table.
 */
export function bars(caption, items, { heads = [], level = null } = {}) {
  const shown = items.slice(0, MOST);
  const covered = level === null ? "interval" : `${percent(level)} interval`;
  const cells = items.map(({ name, probability, interval, extra = [] }) =>
    [name, exact(probability), interval ? `${exact(interval[0])} to ${exact(interval[1])}` : "", ...extra]);
  return h("figure", { class: "bars" },
    h("figcaption", {}, caption),
    h("ul", {}, shown.map((item) => row(item, covered))),
    items.length > MOST ? h("p", { class: "hint" }, `${items.length - MOST} more are in the table.`) : null,
    asTable(caption, ["Answer", "Probability", `${covered[0].toUpperCase()}${covered.slice(1)}`, ...heads], cells));
}

function row({ name, probability, interval, notes = [], best = false }, covered) {
  const said = `${name}: ${percent(probability)}${interval ? `, ${covered} ${between(interval)}` : ""}`;
  return h("li", { class: best ? "best" : null },
    h("span", { class: "name" }, name, notes.map((note) => h("span", { class: "tag" }, note))),
    svg("svg", { role: "img", "aria-label": said, height: 18, width: "100%" }, drawn(probability, interval)),
    h("span", { class: "value" }, percent(probability), interval ? h("small", {}, between(interval)) : null));
}

function drawn(probability, interval) {
  const at = (p) => `${(100 * p).toFixed(2)}%`;
  const line = (x1, y1, x2, y2) => svg("line", { class: "whisker", x1: at(x1), y1, x2: at(x2), y2 });
  const parts = [
    svg("rect", { class: "track", x: 0, y: 3, width: "100%", height: 12, rx: 2 }),
    svg("rect", { class: "bar", x: 0, y: 3, width: at(probability), height: 12, rx: 2 }),
  ];
  if (!interval) return parts;
  const [low, high] = interval;
  return [...parts, line(low, 9, high, 9), line(low, 4, low, 14), line(high, 4, high, 14)];
}

/** Where the doubt comes from. `most`: the largest entropy there can be, or null. */
export function split({ total, aleatoric, epistemic }, most = null) {
  const whole = Math.max(most ?? total, total, 1e-9);
  const at = (x) => `${((100 * Math.max(x, 0)) / whole).toFixed(2)}%`;
  const hatch = fresh("hatch");
  const said = `${nats(total)} of doubt: ${nats(aleatoric)} aleatoric, ${nats(epistemic)} epistemic`;
  return h("figure", { class: "split" },
    h("figcaption", {}, "Where the doubt comes from"),
    svg("svg", { role: "img", "aria-label": said, height: 18, width: "100%" },
      svg("defs", {}, svg("pattern", { id: hatch, width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
        svg("rect", { class: "epistemic", width: 6, height: 6 }), svg("rect", { class: "stripe", width: 2, height: 6 }))),
      svg("rect", { class: "track", x: 0, y: 3, width: "100%", height: 12, rx: 2 }),
      svg("rect", { class: "aleatoric", x: 0, y: 3, width: at(aleatoric), height: 12 }),
      svg("rect", { fill: `url(#${hatch})`, x: at(aleatoric), y: 3, width: at(epistemic), height: 12 })),
    h("ul", { class: "keys" },
      h("li", {}, h("span", { class: "key aleatoric" }), h("b", {}, nats(aleatoric)), " aleatoric: it would stay if the weights were known"),
      h("li", {}, h("span", { class: "key epistemic" }), h("b", {}, nats(epistemic)), " epistemic: it comes from not knowing the weights"),
      h("li", {}, h("span", { class: "key" }), h("b", {}, nats(total)), most === null ? " in all" : ` in all, of at most ${nats(most)}`)));
}

/** How often answers of a confidence were right. bins: [{from, to, n, right, confidence, interval}], none of n = 0. */
export function reliability(bins) {
  const [left, bottom, size] = [44, 304, 272];
  const x = (p) => left + size * p;
  const y = (p) => bottom - size * p;
  const ticks = [0, 0.25, 0.5, 0.75, 1];
  const caption = "How often answers were right, by their confidence";
  const share = (bin) => bin.right / bin.n;
  const said = bins.map((bin) => `${bin.n} answers of about ${percent(bin.confidence)}: ${percent(share(bin))} right`).join("; ");
  const picture = svg("svg", { role: "img", "aria-label": `${caption}. ${said || "Nothing is marked yet."}`, viewBox: "0 0 330 350" },
    ticks.map((t) => [
      svg("line", { class: "grid", x1: x(t), y1: y(0), x2: x(t), y2: y(1) }),
      svg("line", { class: "grid", x1: x(0), y1: y(t), x2: x(1), y2: y(t) }),
      svg("text", { x: x(t), y: bottom + 18, "text-anchor": "middle" }, String(100 * t)),
      svg("text", { x: left - 8, y: y(t) + 4, "text-anchor": "end" }, String(100 * t)),
    ]).flat(),
    svg("line", { class: "ideal", x1: x(0), y1: y(0), x2: x(1), y2: y(1) }),
    svg("text", { x: x(0.5), y: 346, "text-anchor": "middle" }, "confidence, %"),
    svg("text", { x: 4, y: 12 }, "right, %"),
    bins.map((bin) => [
      svg("line", { class: "whisker", x1: x(bin.confidence), y1: y(bin.interval[0]), x2: x(bin.confidence), y2: y(bin.interval[1]) }),
      svg("circle", { class: "dot", cx: x(bin.confidence), cy: y(share(bin)), r: Math.min(4 + Math.sqrt(bin.n), 12) }),
    ]).flat());
  const rows = bins.map((bin) => [`${percent(bin.from)} to ${percent(bin.to)}`, String(bin.n), String(bin.right), exact(bin.confidence),
    exact(share(bin)), bin.interval.map(exact).join(" to ")]);
  return h("figure", { class: "diagram" },
    h("figcaption", {}, caption),
    picture,
    h("p", { class: "hint" }, "Dots on the dashed line are calibrated. Larger dots stand for more answers, lines are 90 % intervals of the share."),
    table(caption, ["Confidence", "Answers", "Right", "Mean confidence", "Share right", "90 % interval"], rows));
}
