// The page "Ask": a question becomes a request, and each answer a card. Several models answer side by side.

import { card as answerCard } from "./answer.js";
import { call } from "./api.js";
import { $, between, exact, h, percent, table, working } from "./dom.js";
import { example } from "./examples.js";
import { chosen, isPosterior, offer, onModel } from "./models.js";

const form = $("#ask-form");
const get = (name) => form.elements[name];
const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
const own = () => get("kind").value === "own";

export function start() {
  onModel(fit);
  form.addEventListener("change", ({ target }) => target.name === "kind" && arrange());
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    working(form, "Asking …", ask);
  });
  $("#example").addEventListener("click", () => show(example(chosen(), get("kind").value)));
}

/** Fits the form to another model. */
function fit(model, models) {
  const choice = model.task === "choice" && isPosterior(model);
  $("#own").hidden = !choice;
  if (choice) get("kind").value = "own";
  else if (own()) get("kind").value = "choice";
  offer(get("predictive"), model, ["linearized", "mixture", "map"]);
  $("#also").replaceChildren(h("legend", {}, "Ask these too, side by side"), ...others(model, models).map(([id, predictive, said]) =>
    h("label", {}, h("input", { type: "checkbox", name: "also", value: JSON.stringify([id, predictive]) }), ` ${said}`)));
  arrange();
}

/** What else can be asked the same: the model's other predictives, other posteriors, the base. */
function others(model, models) {
  const names = { map: "theta* alone (MAP)", mixture: "mixture of particles", linearized: "linearised" };
  const same = isPosterior(model) ? model.predictives.map((each) => [model.id, each, `${model.id}: ${names[each]}`]) : [];
  const rest = models.filter((each) => each.id !== model.id && !each.id.endsWith("/map"));
  return [...same, ...rest.map(({ id, family }) => [id, null, family ? id : `${id}, the base`])];
}

/** Shows the fields that this kind of question has. */
function arrange() {
  const kind = get("kind").value;
  const names = own() ? chosen().fields : ["input"];
  const before = [...$("#inputs").querySelectorAll("textarea")].map(({ name }) => name);
  if (String(before) !== String(names)) {
    $("#inputs").replaceChildren(...names.map((name) => h("label", {}, own() ? `Field "${name}"` : "What the question is about",
      h("textarea", { name, rows: 3, required: true, "data-input": true }))));
  }
  const options = kind === "choice" || kind === "score";
  $("#instructions").hidden = own();
  $("#instructions").firstChild.textContent = kind === "predicate" ? "Statement " : "Question ";
  $("#options").hidden = $("#options-hint").hidden = !options;
  $("#options").firstChild.textContent = kind === "score" ? "Levels, one a line, the lowest first " : "Options, one a line ";
}

/** Fills the form. `filled`: {kind, inputs: {name: text}, instructions?, options?}. */
export function show(filled) {
  get("kind").value = filled.kind;
  arrange();
  for (const [name, text] of Object.entries(filled.inputs)) form.querySelector(`textarea[name="${name}"]`).value = text;
  get("instructions").value = filled.instructions ?? "";
  get("options").value = (filled.options ?? []).join("\n");
}

/** The question as POST /v1/decisions has it. Raises Error for one that is not whole. */
function question() {
  const type = get("kind").value;
  const instructions = get("instructions").value.trim();
  if (!instructions) throw new Error(type === "predicate" ? "Write the statement." : "Write the question.");
  if (type === "predicate") return { type, instructions };
  const options = lines(get("options").value).map((line) => line.split("|").map((part) => part.trim()));
  if (options.length < 2) throw new Error("Write at least two options, each on a line of its own.");
  const described = ([name, description], key) => ({ [key]: name, ...(description && { description }) });
  if (type === "choice") return { type, instructions, choices: options.map((each) => described(each, "value")) };
  return { type, instructions, levels: options.map((each) => described(each, "label")) };
}

async function ask() {
  const inputs = Object.fromEntries([...form.querySelectorAll("[data-input]")].map(({ name, value }) => [name, value]));
  const coverage = Number(get("coverage").value) / 100;
  const risk = get("risk").value === "" || own() ? null : Number(get("risk").value) / 100;
  const model = chosen();
  const asked = { inputs, coverage, risk, ...(own() ? { path: "v1/predictive" } : { path: "v1/decisions", question: question() }) };
  const also = [...form.querySelectorAll('[name="also"]:checked')].map(({ value }) => JSON.parse(value));
  const all = [[model.id, get("predictive").value || null], ...also];
  const found = await Promise.allSettled(all.map(([id, predictive]) => one(asked, id, predictive)));
  if (found.length === 1 && found[0].status === "rejected") throw found[0].reason;
  const cards = found.map((each, i) => each.status === "fulfilled" ? each.value.card
    : h("article", { class: "card" }, h("h3", {}, nameOf(all[i])), h("p", { class: "trouble" }, each.reason.message)));
  const answered = found.flatMap((each, i) => each.status === "fulfilled" ? [[nameOf(all[i]), each.value]] : []);
  $("#answers").replaceChildren(...(found.length > 1 ? [comparison(answered)] : []), h("div", { class: "cards" }, cards));
  $("#answers").focus({ preventScroll: window.innerWidth > 900 });
  const { record, refused } = found[0].value ?? {};
  return record ? `${refused ? "Refused" : "Answered"}: ${record.answer}, ${percent(record.confidence)}.` : "";
}

/** Asks one model. */
async function one({ path, inputs, coverage, risk, question }, model, predictive) {
  const uncertainty = { coverage, ...(predictive && { predictive }), ...(risk !== null && { max_risk: risk }) };
  const subtitle = nameOf([model, predictive]);
  if (path === "v1/predictive") {
    const reply = await call(path, { model, inputs: [inputs], ...uncertainty });
    const record = reply.data[0];
    const title = Object.values(inputs).join(" · ");
    return { record, card: answerCard(record, { title, subtitle, level: coverage }, { id: reply.id, index: 0 }) };
  }
  const reply = await call(path, { model, input: inputs.input, questions: [question], uncertainty });
  const [answer] = reply.answers;
  const record = answer.uncertainty;
  const names = new Map(question.levels?.map(({ label }, number) => [number, label]));
  names.ordered = question.type === "score";
  const refused = answer.type === "refusal";
  const note = typeof answer.score === "number" ? `Mean level ${answer.score.toFixed(2)}, counted from 0.` : null;
  const told = { title: question.instructions, subtitle, names, note, level: coverage, risk: risk === null ? null : percent(risk) };
  return { record, refused, card: answerCard(record, told, { id: reply.id, index: 0 }, refused) };
}

const nameOf = ([model, predictive]) => (predictive ? `${model}, ${predictive}` : model);

function comparison(answered) {
  const rows = answered.map(([name, { record, refused }]) => {
    const top = record.answers.find(({ answer }) => answer === record.answer);
    const { total, aleatoric, epistemic } = record.entropy;
    return [name, `${String(record.answer).trim()}${refused ? ", refused" : ""}`, percent(record.confidence), between(top.interval), exact(total), exact(aleatoric),
      exact(epistemic), record.calibrated ? "yes" : "no"];
  });
  return table("Side by side; entropies in nats", ["Model", "Answer", "Confidence", "Interval", "Total", "Aleatoric", "Epistemic", "Calibrated"], rows);
}
