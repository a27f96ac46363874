// The page "Chat": a conversation whose answers stream in token by token, each with its doubt.

import { stream } from "./api.js";
import { badge } from "./answer.js";
import { $, h, nats, percent, working } from "./dom.js";
import { chosen, offer, onModel } from "./models.js";
import { thumbs } from "./outcomes.js";
import { TokenText, detail, legend, tokenTable, visible } from "./tokens.js";

const form = $("#chat-form");
const get = (name) => form.elements[name];
const texts = [];
let conversation = []; // messages as the API has them
let running = null;

export function start() {
  onModel((model) => offer(get("predictive"), model, ["mixture", "map"]));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    working(form, "Writing …", say);
  });
  get("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  $("#stop").addEventListener("click", () => running?.abort());
  $("#fresh").addEventListener("click", clear);
  $("#view").addEventListener("change", look);
  look();
}

const view = () => $("#view").elements.view.value;

function look() {
  $("#legend").replaceChildren(...legend(view()));
  texts.forEach((text) => text.show(view()));
}

function clear() {
  running?.abort();
  conversation = [];
  texts.length = 0;
  $("#messages").replaceChildren(h("p", { class: "empty" }, "A new chat."));
  forget();
  get("message").focus();
}

async function say() {
  const content = get("message").value.trim();
  if (!content) throw new Error("Write a message.");
  const model = chosen().id;
  const mine = conversation; // a new chat leaves this one behind
  const said = h("div", { class: "message" }, h("p", { class: "who" }, "You"), h("p", { class: "text" }, content));
  const text = new TokenText(view(), show);
  const answer = h("div", { class: "message answer" }, h("p", { class: "who" }, model), text.element);
  if (!mine.length) $("#messages").replaceChildren();
  $("#messages").append(said, answer);
  texts.push(text);
  get("message").value = "";
  running = new AbortController();
  $("#stop").disabled = false;
  try {
    const { id, record } = await write(text, model, [...mine, { role: "user", content }], running.signal);
    if (record) answer.append(...summary(record, text, id, content));
  } finally {
    $("#stop").disabled = true;
    if (text.tokens.length) {
      answer.append(tokenTable(text.tokens));
      mine.push({ role: "user", content }, { role: "assistant", content: text.tokens.map((each) => each.text).join("") });
    } else {
      said.remove();
      answer.remove();
      texts.splice(texts.indexOf(text), 1);
      get("message").value ||= content; // nothing came: it can be sent again
    }
  }
  return "The answer is complete.";
}

/** Streams an answer into `text`. The reply's id, and its record of the whole text, if there is one. */
async function write(text, model, messages, signal) {
  const predictive = get("predictive").value;
  const uncertainty = { ...(predictive && { predictive }), ...(predictive !== "map" && chosen().family && { per_particle: true }) };
  const body = {
    model, messages, logprobs: true, top_logprobs: 5, max_tokens: Number(get("tokens").value),
    temperature: Number(get("temperature").value), ...(chosen().family && { uncertainty }),
  };
  const speaker = sentences();
  let id, record;
  for await (const chunk of stream("v1/chat/completions", body, signal)) {
    id = chunk.id;
    for (const choice of chunk.choices) {
      text.describe(choice.uncertainty?.tokens ?? []);
      tokensOf(choice).forEach((token) => text.add(token));
      speaker(choice.delta?.content ?? "", choice.finish_reason !== null);
      if (choice.finish_reason) record = choice.uncertainty;
    }
  }
  return { id, record };
}

/** The tokens of a chunk. Half a character comes with the token that completes it. */
function tokensOf(choice) {
  const content = choice.delta?.content ?? "";
  const listed = choice.logprobs?.content ?? [];
  const joined = listed.map(({ token }) => token).join("") === content;
  return listed.map(({ token, logprob, top_logprobs: alternatives }, i) => {
    const text = joined ? token : i ? "" : content;
    return { text, name: token, logprob, alternatives, ends: choice.finish_reason === "stop" && text === "" };
  });
}

/** Says whole sentences to a screen reader, and not each token by itself. */
function sentences() {
  let rest = "";
  return (more, last) => {
    rest += more;
    const end = last ? rest.length : Math.max(...[". ", "! ", "? ", "\n"].map((mark) => rest.lastIndexOf(mark) + mark.length * rest.includes(mark)));
    if (end <= 0) return;
    $("#spoken").textContent = rest.slice(0, end);
    rest = rest.slice(end);
  };
}

function summary(record, text, id, what) {
  const { entropy, mean_token_probability: mean, information } = record;
  const count = text.tokens.length;
  return [
    entropy && h("p", { class: "hint" },
      `${count} tokens; ${nats(entropy.total)} of doubt in all, ${nats(entropy.epistemic)} of it epistemic. `,
      `Mean probability of a token ${percent(mean)}. The text tells ${nats(information)} about the weights.`),
    record.confidence === null || record.confidence === undefined
      ? h("p", { class: "hint" }, "How probably it is right is not known: that takes a calibration on graded answers.")
      : h("p", { class: "verdict" }, "Right with a probability of ", h("strong", {}, percent(record.confidence))),
    record.confidence === null || record.confidence === undefined ? null : badge(record),
    thumbs({ id, index: 0, confidence: record.confidence, calibrated: record.calibrated, what, said: "a text" }),
  ].filter(Boolean);
}

function forget() {
  $("#token").replaceChildren(h("p", { class: "empty" }, "No token is chosen."));
}

function show(token, byKeyboard) {
  $("#token").replaceChildren(h("button", { type: "button", class: "quiet close", onclick: forget }, "Close"), ...detail(token));
  if (!byKeyboard) return;
  const doubt = token.record ? `, doubt ${nats(token.record.entropy.total)}, epistemic ${nats(token.record.entropy.epistemic)}` : "";
  $("#spoken").textContent = `${visible(token.name)}: ${percent(Math.exp(token.logprob))}${doubt}`;
}
