// Starts the page: its parts, the key, the models, and which part is seen.

import { call, onKeyNeeded } from "./api.js";
import * as ask from "./ask.js";
import * as chat from "./chat.js";
import { $ } from "./dom.js";
import { example } from "./examples.js";
import * as meanings from "./meanings.js";
import { chosen, load } from "./models.js";
import * as outcomes from "./outcomes.js";

const PAGES = ["ask", "chat", "meanings", "outcomes"];

function open(event) {
  const wanted = location.hash.slice(1);
  if (event && !PAGES.includes(wanted)) return; // another place on the same page
  const page = PAGES.includes(wanted) ? wanted : PAGES[0];
  for (const each of PAGES) {
    $(`#page-${each}`).hidden = each !== page;
    const link = $(`nav a[href="#${each}"]`);
    if (each === page) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${$(`nav a[href="#${page}"]`).textContent}: Posterior Server`;
  if (!event) return;
  window.scrollTo(0, 0);
  $(`#title-${page}`).focus();
}

/** Shows the dialog for the key; resolves to what was typed, or to null. */
function askForKey(wrong) {
  const dialog = $("#key");
  const input = dialog.querySelector("input");
  $("#key-said").textContent = wrong ? "This is not a key of this server." : "";
  dialog.returnValue = "";
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    const key = dialog.returnValue === "use" ? input.value : null;
    input.value = "";
    resolve(key);
  }, { once: true }));
}

async function start() {
  onKeyNeeded(askForKey);
  for (const part of [ask, chat, meanings]) part.start();
  outcomes.draw();
  addEventListener("hashchange", open);
  open();
  try {
    await load();
    ask.show(example(chosen(), $("#ask-form").elements.kind.value));
    $("#version").textContent = `Version ${(await call("version")).version}.`;
  } catch (error) {
    $("#model").replaceChildren(new Option("none", ""));
    $("#trouble").textContent = `${error.message} Reload the page to try again.`;
  }
}

start();
