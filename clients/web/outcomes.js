// Thumbs, and the page "Outcomes": what was marked here, and the reliability diagram of it.

import { call } from "./api.js";
import { reliability } from "./charts.js";
import { $, exact, h, percent, svg, table } from "./dom.js";

const BINS = 5;
const Z = 1.645; // of 90 % intervals
const NOT_KEPT = "this server keeps no answers";
const THUMB = "M2 9h3v9H2z M7 9l3-7c1.6 0 2.5 1.2 2.1 3l-.6 3H17c1 0 1.7 1 1.4 2l-2 7c-.2.6-.8 1-1.4 1H7z";
const marked = []; // {what, said, confidence, calibrated, right}

/** Two buttons that say whether an answer was right. answer: {id, index, confidence, calibrated, what, said}. */
export function thumbs(answer) {
  const said = h("span", { role: "status" });
  const button = (right, label) => h("button", {
    type: "button", class: "quiet", "aria-pressed": "false", onclick: ({ currentTarget }) => mark(answer, right, currentTarget, said),
  }, svg("svg", { class: right ? "thumb" : "thumb down", viewBox: "0 0 20 20", "aria-hidden": "true" }, svg("path", { d: THUMB })), label);
  return h("div", { class: "thumbs", role: "group", "aria-label": `Was the answer to "${answer.what}" right?` },
    button(true, "Right"), button(false, "Wrong"), said);
}

async function mark(answer, right, button, said) {
  const buttons = [...button.parentElement.querySelectorAll("button")];
  if (buttons.some((each) => each.getAttribute("aria-disabled") === "true")) return;
  buttons.forEach((each) => each.setAttribute("aria-disabled", "true"));
  said.textContent = "";
  try {
    said.textContent = await report(answer, right);
    button.setAttribute("aria-pressed", "true");
    marked.push({ ...answer, right });
    draw();
  } catch (error) {
    said.textContent = error.message;
    buttons.forEach((each) => each.removeAttribute("aria-disabled"));
  }
}

/** Tells the server; what became of it. Raises ApiError for what could be tried again. */
async function report({ id, index }, correct) {
  try {
    await call("v1/outcomes", { id, index, correct });
    return "The server keeps it.";
  } catch (error) {
    if (error.status !== 404) throw error;
    if (!error.message.startsWith(NOT_KEPT)) return `Counted on this page only: ${error.message}.`;
    $("#kept").textContent = "This server keeps no outcomes (posterior serve --outcomes keeps them). What you mark is counted on this page only.";
    return "Counted on this page only: the server keeps no outcomes.";
  }
}

/** Draws the page anew. */
export function draw() {
  const known = marked.filter(({ confidence }) => typeof confidence === "number");
  const without = marked.length - known.length;
  const brier = known.reduce((sum, { confidence, right }) => sum + (confidence - right) ** 2, 0) / known.length;
  const right = known.filter((each) => each.right).length;
  const mean = known.reduce((sum, { confidence }) => sum + confidence, 0) / known.length;
  const count = known.length === 1 ? "1 answer is" : `${known.length} answers are`;
  const rows = marked.map(({ what, said, confidence, calibrated, right }) =>
    [what, said, typeof confidence === "number" ? exact(confidence) : "not known", calibrated ? "yes" : "no", right ? "right" : "wrong"]);
  $("#reliability").replaceChildren(...[
    h("p", {}, known.length
      ? `${count} marked, ${right} of them right (${percent(right / known.length)}) at a mean confidence of ${percent(mean)}. Brier score of this: ${exact(brier)}.`
      : "No answer is marked yet. Ask something, then say whether it was right."),
    without ? h("p", { class: "hint" }, `${without} more have no probability of being right, and are not in the diagram.`) : null,
    known.length && known.length < 50 ? h("p", { class: "hint" }, "So few answers show how it works. Judge a calibration by hundreds.") : null,
    reliability(binned(known)),
    marked.length ? table("What you marked", ["Asked", "Answer", "Confidence", "Calibrated", "Outcome"], rows) : null,
  ].filter(Boolean));
}

/** The bins of equal width that have answers. */
export function binned(known) {
  const number = ({ confidence }) => Math.min(Math.floor(confidence * BINS), BINS - 1);
  return Array.from({ length: BINS }, (_, bin) => known.filter((each) => number(each) === bin)).flatMap((inside, bin) => {
    const n = inside.length;
    const right = inside.filter((each) => each.right).length;
    const confidence = inside.reduce((sum, each) => sum + each.confidence, 0) / n;
    return n ? [{ from: bin / BINS, to: (bin + 1) / BINS, n, right, confidence, interval: wilson(right, n) }] : [];
  });
}

/** Wilson's interval of a share (1927). */
export function wilson(right, n) {
  const p = right / n;
  const middle = (p + Z ** 2 / (2 * n)) / (1 + Z ** 2 / n);
  const half = (Z / (1 + Z ** 2 / n)) * Math.sqrt((p * (1 - p)) / n + Z ** 2 / (4 * n ** 2));
  return [Math.max(middle - half, 0), Math.min(middle + half, 1)];
}
