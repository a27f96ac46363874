// The models that the server has, and the one that is chosen.

import { call } from "./api.js";
import { $, h } from "./dom.js";

const listeners = [];
let cards = [];

/** `listener(card, cards)` is called when another model is chosen. */
export function onModel(listener) {
  listeners.push(listener);
}

/** The card of the chosen model. Raises Error where there is none. */
export function chosen() {
  const card = cards.find(({ id }) => id === $("#model").value);
  if (!card) throw new Error("The models could not be read. Reload the page.");
  return card;
}

/** Reads the list and chooses the first posterior of decisions, or the first posterior. */
export async function load() {
  cards = (await call("v1/models")).data;
  const fitted = cards.filter(isPosterior);
  const first = fitted.find(({ task }) => task === "decision") ?? fitted[0] ?? cards[0];
  $("#model").replaceChildren(...cards.map(({ id }) => h("option", { value: id, selected: id === first?.id }, id)));
  $("#model").addEventListener("change", tell);
  tell();
}

/** Whether this is a posterior, and not theta* of one or the base. */
export const isPosterior = ({ id, family }) => family !== undefined && !id.endsWith("/map");

/** Fills a menu with the predictives that `card` has of these; the first entry leaves it to the server. */
export function offer(select, card, these) {
  const own = (card.predictives ?? []).filter((name) => these.includes(name));
  select.replaceChildren(h("option", { value: "" }, "the model's default"), ...own.map((name) => h("option", {}, name)));
}

function tell() {
  const card = cards.find(({ id }) => id === $("#model").value);
  if (card) listeners.forEach((listener) => listener(card, cards));
}
