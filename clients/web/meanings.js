// The page "Meanings": samples of an answer, counted by what they mean.

import { badge } from "./answer.js";
import { call } from "./api.js";
import { bars, split } from "./charts.js";
import { $, exact, h, percent, shown, working } from "./dom.js";
import { chosen, isPosterior } from "./models.js";
import { thumbs } from "./outcomes.js";

const LEVEL = 0.9; // of the intervals
const form = $("#meanings-form");
const get = (name) => form.elements[name].value;

export function start() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    working(form, "Drawing samples …", draw);
  });
}

async function draw() {
  const model = chosen();
  if (!model.family) throw new Error("Samples need a posterior, and this is the base alone. Choose another model.");
  const content = get("question").trim();
  const body = {
    model: model.id,
    messages: [{ role: "user", content }],
    max_tokens: Number(get("tokens")),
    uncertainty: {
      samples: Number(get("samples")), meaning: get("meaning"), return: get("return"), coverage: LEVEL,
      ...(!isPosterior(model) && { predictive: "map" }),
    },
  };
  const reply = await call("v1/chat/completions", body);
  const [choice] = reply.choices;
  $("#meant").replaceChildren(card(choice.uncertainty, content, choice.message.content ?? "", reply.id));
  $("#meant").focus({ preventScroll: window.innerWidth > 900 });
  return `${choice.uncertainty.semantic.meanings.length} meanings.`;
}

function card(record, question, text, id) {
  const { semantic } = record;
  const items = semantic.meanings.map((each, i) => ({
    name: shown(each.text), probability: each.probability, interval: each.interval, best: i === semantic.own,
    notes: i === semantic.own ? ["returned"] : [], extra: [String(each.samples), exact(each.standard_error)],
  }));
  return h("article", { class: "card" },
    h("h3", {}, question),
    h("p", { class: "verdict" }, h("strong", {}, shown(text))),
    bars(`What ${semantic.samples} samples mean`, items, { heads: ["Samples", "Standard error"], level: LEVEL }),
    semantic.others ? h("p", { class: "hint" }, `${semantic.others.meanings} more meanings, together ${percent(semantic.others.probability)}.`) : null,
    semantic.truncated ? h("p", { class: "strange" }, `${semantic.truncated} of the samples were cut at the most tokens, and count as they are.`) : null,
    split(semantic.entropy, Math.log(semantic.samples)),
    h("p", { class: "hint" }, "Few samples miss rare meanings, so that the doubt is rather larger than it says here."),
    record.confidence === null ? h("p", { class: "hint" }, "How probably it is right is not known: that takes a calibration on graded answers.")
      : h("p", { class: "verdict" }, "Right with a probability of ", h("strong", {}, percent(record.confidence))),
    record.confidence === null ? null : badge(record),
    thumbs({ id, index: 0, confidence: record.confidence, calibrated: record.calibrated, what: question, said: shown(text) }));
}
