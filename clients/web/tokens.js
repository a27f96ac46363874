// A text as its tokens, each marked by its doubt: by colour, and by the line below it.

import { bars } from "./charts.js";
import { asTable, exact, h, nats, percent, split3 } from "./dom.js";

// The least doubt of the levels 1 to 4, in nats. The epistemic part is much the smaller one.
const LEAST = { total: [0.2, 0.7, 1.5, 3], aleatoric: [0.2, 0.7, 1.5, 3], epistemic: [0.01, 0.03, 0.1, 0.3] };
export const VIEWS = { total: "Total doubt", aleatoric: "Aleatoric doubt", epistemic: "Epistemic doubt" };

const levelOf = (nats, view) => LEAST[view].filter((least) => nats >= least).length;

/** What the marks mean. */
export function legend(view) {
  if (view === "none") return [];
  const least = [0, ...LEAST[view]];
  const name = (level) => (level === 4 ? `${least[4]} and more` : `${least[level]} to ${least[level + 1]}`);
  return [h("span", {}, `${VIEWS[view]}, nats: `),
    h("ul", { class: "levels" }, least.map((_, level) => h("li", {}, h("span", { class: "token", "data-level": level }, name(level)))))];
}

/**
 * A text that grows. `chosen(token, byKeyboard)` is called for the token that somebody points at or moves to.
 *
 * A token: {text, name, logprob, alternatives: [{token, logprob}], record: the reply's record of it, if it has come}. Its text is
 * empty where it is half a character, or ends the answer.
 */
export class TokenText {
  tokens = [];
  element = h("div", { class: "text", role: "group", "aria-label": "Text of the answer; the arrow keys move from token to token" });
  #records = [];
  #current = 0;
  #view;

  constructor(view, chosen) {
    this.#view = view;
    const at = ({ target }) => this.#spans.indexOf(target.closest(".token"));
    this.element.addEventListener("pointerover", (event) => at(event) >= 0 && chosen(this.tokens[at(event)], false));
    this.element.addEventListener("focusin", (event) => {
      const index = at(event);
      if (index < 0) return;
      this.#move(index);
      chosen(this.tokens[index], true);
    });
    this.element.addEventListener("keydown", (event) => {
      const last = this.tokens.length - 1;
      const to = { ArrowRight: this.#current + 1, ArrowLeft: this.#current - 1, Home: 0, End: last }[event.key];
      if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.#spans[Math.min(Math.max(to, 0), last)].focus();
    });
  }

  get #spans() {
    return [...this.element.children];
  }

  add(token) {
    const index = this.tokens.push(token) - 1;
    token.record = this.#records[index];
    this.element.append(h("span", { class: "token", tabindex: index ? -1 : 0, "data-level": this.#level(token) },
      token.ends ? h("span", { class: "end" }, "end") : token.text));
  }

  /** Takes the records of the next tokens, some of which may come later. */
  describe(records) {
    for (const record of records) {
      const index = this.#records.push(record) - 1;
      if (index >= this.tokens.length) continue;
      this.tokens[index].record = record;
      this.#spans[index].dataset.level = this.#level(this.tokens[index]);
    }
  }

  /** Marks the tokens by another part of the doubt. */
  show(view) {
    this.#view = view;
    this.#spans.forEach((span, i) => { span.dataset.level = this.#level(this.tokens[i]); });
  }

  #level({ record }) {
    return record && this.#view !== "none" ? levelOf(record.entropy[this.#view], this.#view) : 0;
  }

  #move(index) {
    const spans = this.#spans;
    spans[this.#current].tabIndex = -1;
    spans[index].tabIndex = 0;
    this.#current = index;
  }
}

/** Everything about a token. */
export function detail({ name, logprob, alternatives, record }) {
  const p = Math.exp(logprob);
  const listed = alternatives.map((each) => ({
    name: visible(each.token), probability: Math.exp(each.logprob), best: each.token === name,
  }));
  return [
    h("h3", {}, h("code", {}, visible(name))),
    h("p", { class: "verdict" }, h("strong", {}, percent(p)), " to come next here"),
    record ? doubts(record) : h("p", { class: "hint" }, "One adapter wrote this: there is no doubt about weights to show."),
    listed.length ? bars("What else could have come", listed) : null,
    record?.per_particle ? bars("What each particle gives this token", particles(record.per_particle), { heads: ["Weight"] }) : null,
  ].filter(Boolean);
}

function doubts({ entropy, epistemic_variance: variance }) {
  return h("dl", { class: "numbers" },
    h("dt", {}, "Total doubt"), h("dd", {}, nats(entropy.total)),
    h("dt", {}, "aleatoric"), h("dd", {}, nats(entropy.aleatoric)),
    h("dt", {}, "epistemic"), h("dd", {}, `${Math.max(entropy.epistemic, 0).toFixed(3)} nats`),
    h("dt", {}, "Std over particles"), h("dd", {}, exact(Math.sqrt(Math.max(variance, 0)))));
}

const particles = ({ logprob, weight }) => logprob.map((each, k) => ({
  name: `${k + 1}`, probability: Math.exp(each), notes: [`weight ${weight[k].toFixed(2)}`], extra: [exact(weight[k])],
}));

/** A token whose blanks can be seen. */
export const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎") || "(nothing)";

/** All tokens of a text as a table. */
export const tokenTable = (tokens) => asTable("Tokens of the answer; entropies in nats",
  ["Token", "Probability", "Total", "Aleatoric", "Epistemic", "Next best"],
  tokens.map(({ name, logprob, alternatives, record }) => {
    const other = alternatives.find(({ token }) => token !== name);
    return [visible(name), exact(Math.exp(logprob)), ...split3(record?.entropy),
      other ? `${visible(other.token)} ${exact(Math.exp(other.logprob))}` : ""];
  }));
