// One answer among options: what it is, how sure, why it was refused, which record calibrated it.

import { bars, split } from "./charts.js";
import { exact, h, percent, shown } from "./dom.js";
import { thumbs } from "./outcomes.js";

const REASONS = {
  ambiguous: "Ambiguous: the question itself leaves it open. More training rows would not help.",
  unfamiliar: "Unfamiliar: the posterior knows too little about such inputs. More training rows would help.",
};
const STRANGE = 0.05; // at most so many held-out rows are as strange

/**
 * A card.
 *
 * record: the reply's `uncertainty`. asked: {title, subtitle, names: option -> text, note, level, risk}. reply: {id, index} for outcomes.
 * refused: whether the server refused to answer.
 */
export function card(record, { title, subtitle, names, note, level, risk }, reply, refused = false) {
  const name = (value) => names?.get(value) ?? shown(value);
  const inside = new Set(record.prediction_set ?? []);
  const items = record.answers.map((each) => ({
    name: name(each.answer),
    probability: each.probability,
    interval: each.interval,
    best: each.answer === record.answer,
    notes: inside.has(each.answer) ? ["in the set"] : [],
    extra: [exact(each.std), ...(record.calibrated ? [exact(each.uncalibrated)] : [])],
  }));
  if (!names?.ordered) items.sort((a, b) => b.probability - a.probability);
  const heads = record.calibrated ? ["Std", "Before calibration"] : ["Std"];
  return h("article", { class: "card" },
    h("h3", {}, title, subtitle ? h("small", {}, subtitle) : null),
    refused ? refusal(record, name, risk)
      : h("p", { class: "verdict" }, h("strong", {}, name(record.answer)), ` ${percent(record.confidence)}`),
    note ? h("p", { class: "hint" }, note) : null,
    bars("Probability of each answer", items, { heads, level }),
    h("p", {}, setOf(record, name, level)),
    split(record.entropy, Math.log(record.answers.length)),
    familiarity(record.familiarity),
    badge(record),
    h("p", { class: "hint" }, source(record)),
    thumbs({ ...reply, confidence: record.confidence, calibrated: record.calibrated, what: title, said: name(record.answer) }));
}

function refusal(record, name, risk) {
  return h("div", { class: "refusal" },
    h("p", { class: "verdict" }, h("strong", {}, "Refused"), ` for an error of at most ${risk}`),
    h("p", {}, REASONS[record.reason] ?? record.reason),
    h("p", {}, `It would have said "${name(record.answer)}" with ${percent(record.confidence)}. A person should look at it.`));
}

function setOf(record, name, level) {
  if (!record.prediction_set) return "No prediction set: that takes a calibration record of such questions.";
  const members = record.prediction_set.map(name).join(", ");
  return `Prediction set: ${members || "none"}. In ${percent(level)} of such questions the true answer is in the set.`;
}

function familiarity(share) {
  if (share === undefined || share === null) return null;
  const strange = share <= STRANGE;
  return h("p", { class: strange ? "strange" : null },
    strange ? "A strange question: " : "A familiar question: ",
    `${percent(share)} of the held-out rows are at least as strange.`,
    strange ? " Trust the answer less than its probability says." : "");
}

/** Whether a calibration record was applied, with the record itself. */
export function badge(record) {
  if (!record.calibrated) {
    return h("details", { class: "badge" },
      h("summary", {}, h("span", { class: "mark", "aria-hidden": "true" }, "○"), " Not calibrated"),
      h("p", {}, "No record belongs to such a request. The number is the model's own, and was not compared with what turned out to be true."));
  }
  const { method, n, data, conformal, key, ...more } = record.calibration;
  const facts = { method, "held-out rows": n, "hash of the rows": data, "prediction sets": conformal, ...more, ...key };
  return h("details", { class: "badge calibrated" },
    h("summary", {}, h("span", { class: "mark", "aria-hidden": "true" }, "●"), ` Calibrated on ${n} held-out rows`),
    h("p", {}, "The record is applied only to requests that its key fits."),
    h("dl", {}, Object.entries(facts).filter(([, value]) => value !== null && value !== undefined)
      .map(([term, value]) => [h("dt", {}, term.replaceAll("_", " ")), h("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value))])));
}

const CHOSEN = { request: "as you asked", "held-out rows": "chosen by held-out rows", default: "the default" };

function source({ posterior, predictive, chosen_by, particles, mc_error, orders }) {
  const of = predictive === "mixture" ? ` of ${particles} particles` : predictive === "linearized" ? ` (${particles} samples of the scores)` : "";
  return [
    posterior ?? "the base, without a posterior",
    `${predictive}${of}, ${CHOSEN[chosen_by] ?? chosen_by}`,
    mc_error > 0 ? `Monte-Carlo error ${exact(mc_error)}` : null,
    orders ? `${orders.n} orders of the options, which differ by ${exact(orders.total_variation)}` : null,
  ].filter(Boolean).join("; ") + ".";
}
