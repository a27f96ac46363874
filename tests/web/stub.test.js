// The page against canned replies: what it shows, keyboard, names for screen readers, axe on light and dark, and a phone.

import { after, before, test } from "node:test";
import assert from "node:assert/strict";
import { KEY, PHONE, WIDE, launch, open, serve, sound, unlock } from "./browser.js";

let browser, server;

before(async () => { [browser, server] = await Promise.all([launch(), serve("tests.web.stub")]); });
after(async () => { await browser.close(); await server.stop(); });

const go = (page, name) => page.getByRole("navigation").getByRole("link", { name }).click();
const ask = (page) => page.getByRole("button", { name: "Ask", exact: true }).click();
const answers = (page) => page.getByRole("region", { name: "Answers" });

test("the key is asked for, refused when wrong, and kept nowhere", async () => {
  const { page, close } = await open(browser, server.url, { key: null });
  const dialog = page.getByRole("dialog", { name: "This server asks for a key" });
  await dialog.waitFor();
  await sound(page);
  await page.getByLabel("API key").fill("wrong");
  await page.keyboard.press("Enter");
  await dialog.getByText("This is not a key of this server.").waitFor();
  await unlock(page, KEY);
  assert.equal(await page.evaluate(() => localStorage.length + sessionStorage.length + document.cookie.length), 0);
  assert.ok(!(await page.content()).includes(KEY) && !page.url().includes(KEY));
  assert.equal(await page.getByLabel("API key").evaluate((input) => input.value), "");
  await close();
});

test("without a key the page says so, and asks again with the next request", async () => {
  const { page, close } = await open(browser, server.url, { key: null });
  await page.getByRole("dialog").waitFor();
  await page.keyboard.press("Escape");
  await page.getByText("The server answers only with a key.").waitFor();
  await close();
});

test("a choice shows bars with intervals, the split of the doubt, the set and the record", async () => {
  const { page, close } = await open(browser, server.url);
  await ask(page);
  const region = answers(page);
  await region.getByRole("heading", { name: /Which department/ }).waitFor();
  const names = await region.locator(".bars li svg").evaluateAll((all) => all.map((each) => each.getAttribute("aria-label")));
  assert.equal(names.length, 8);
  assert.match(names[0], /^payments: 64 %, 90 % interval \d+ to \d+ %$/);
  await region.getByRole("img", { name: /nats of doubt: .* aleatoric, .* epistemic/ }).waitFor();
  assert.match(await region.innerText(), /Prediction set: payments, security, top-ups\. In 90 % of such questions/);
  assert.match(await region.innerText(), /A familiar question: \d+ % of the held-out rows/);
  await region.getByText("Calibrated on 300 held-out rows").click();
  assert.match(await region.locator(".badge").innerText(), /method\s+platt/);
  await region.getByText("As a table").click();
  assert.equal(await region.getByRole("table").getByRole("row").count(), 9);
  await sound(page);
  await close();
});

test("predicate, score, refusal and the posterior's own question", async () => {
  const { page, close } = await open(browser, server.url);
  const region = answers(page);
  await page.getByLabel("Predicate").check();
  await page.getByRole("button", { name: "Show an example" }).click();
  await ask(page);
  await region.getByRole("heading", { name: /victim of fraud/ }).waitFor();
  await page.getByLabel("Score").check();
  await page.getByRole("button", { name: "Show an example" }).click();
  await ask(page);
  await region.locator(".bars .name", { hasText: "any time" }).waitFor();
  assert.deepEqual(await region.locator(".bars .name").allInnerTexts(), ["any time", "today", "at once"]);
  await page.getByLabel("Choice").check();
  await page.getByRole("button", { name: "Show an example" }).click();
  await page.getByText("More settings").first().click();
  await page.getByLabel("Refuse above an error of, %").fill("30");
  await ask(page);
  await region.getByText("Refused", { exact: true }).waitFor();
  assert.match(await region.innerText(), /for an error of at most 30 %[\s\S]*Ambiguous: [\s\S]*It would have said "payments" with 64 %/);
  await page.getByRole("combobox", { name: "Model", exact: true }).selectOption("sentiment");
  assert.ok(await page.getByLabel("Its own").isChecked());
  await page.getByRole("button", { name: "Show an example" }).click();
  await ask(page);
  await region.getByRole("heading", { name: /The food was good/ }).waitFor();
  assert.match(await region.innerText(), /Not calibrated/);
  await sound(page);
  await close();
});

test("predictives answer side by side", async () => {
  const { page, close } = await open(browser, server.url);
  await page.getByText("More settings").first().click();
  await page.getByLabel("support: theta* alone (MAP)").check();
  await ask(page);
  const table = answers(page).getByRole("table", { name: /Side by side/ });
  await table.waitFor();
  assert.deepEqual(await table.getByRole("rowheader").allInnerTexts(), ["support", "support, map"]);
  assert.equal(await answers(page).getByRole("article").count(), 2);
  await sound(page);
  await close();
});

test("a chat streams, tokens carry their doubt, and the keyboard moves between them", async () => {
  const { page, close } = await open(browser, server.url);
  await go(page, "Chat");
  assert.equal(await page.evaluate(() => document.activeElement.id), "title-chat");
  await page.getByText("What these numbers are not.").waitFor();
  await page.getByLabel("Message").fill("What is the capital of Australia?");
  await page.keyboard.press("Enter");
  await page.getByText("The answer is complete.").waitFor();
  const tokens = page.locator("#messages .token");
  assert.ok(await tokens.count() > 10);
  const levels = () => tokens.evaluateAll((all) => all.map((each) => each.dataset.level).join(""));
  const total = await levels();
  assert.ok(new Set(total).size > 2, total);
  await page.getByLabel("Epistemic").check();
  assert.notEqual(await levels(), total);
  await page.getByLabel("None").check();
  assert.match(await levels(), /^0+$/);
  await page.getByLabel("Total doubt").check();
  await tokens.first().focus();
  await page.keyboard.press("ArrowRight");
  assert.ok(await tokens.nth(1).evaluate((each) => each === document.activeElement));
  const spoken = () => page.locator("#spoken").innerText();
  assert.match(await spoken(), /%, doubt [\d.]+ nats, epistemic [\d.]+ nats/);
  await page.keyboard.press("End");
  assert.ok(await tokens.last().evaluate((each) => each === document.activeElement));
  assert.equal(await page.locator('#messages .token[tabindex="0"]').count(), 1);
  await tokens.nth(2).hover();
  const aside = page.getByRole("region", { name: "The token" });
  await aside.getByRole("figure", { name: "What else could have come" }).waitFor();
  await aside.getByRole("figure", { name: "What each particle gives this token" }).waitFor();
  assert.equal(await aside.locator("figure").last().locator("li").count(), 8);
  await page.locator("#messages").getByText("As a table").click();
  assert.equal(await page.locator("#messages tbody tr").count(), await tokens.count());
  await sound(page);
  await close();
});

test("a stream that breaks off, and a server that is busy, are said in words", async () => {
  const { page, close } = await open(browser, server.url);
  await go(page, "Chat");
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream",
    body: 'data: {"id": "x", "choices": [{"index": 0, "delta": {"content": "Hi"}, "logprobs": {"content": [{"token": "Hi", "logprob": -1, "top_logprobs": []}]}, "finish_reason": null}]}\n\n' }));
  await page.getByLabel("Message").fill("Hello");
  await page.getByRole("button", { name: "Send" }).click();
  await page.getByText("the stream broke off before its end").waitFor();
  assert.equal(await page.locator("#messages .token").innerText(), "Hi");
  await go(page, "Ask");
  await page.route("**/v1/decisions", (route) => route.fulfill({ status: 503, headers: { "Retry-After": "5" },
    json: { error: { message: "the server is warming up" } } }));
  await ask(page);
  await page.getByText("the server is warming up (try again in 5 s)").waitFor();
  await close();
});

test("samples are counted by what they mean", async () => {
  const { page, close } = await open(browser, server.url);
  await go(page, "Meanings");
  await page.getByRole("button", { name: "Draw samples" }).click();
  const region = page.getByRole("region", { name: "Meanings" });
  await region.getByRole("figure", { name: "What 16 samples mean" }).waitFor();
  await region.getByText("returned", { exact: true }).waitFor();
  await region.getByRole("img", { name: /nats of doubt/ }).waitFor();
  await sound(page);
  await close();
});

test("thumbs are reported once and drawn in the reliability diagram", async () => {
  const { page, close } = await open(browser, server.url);
  const reports = [];
  page.on("request", (request) => request.url().endsWith("/v1/outcomes") && reports.push(request.postDataJSON()));
  await ask(page);
  await answers(page).getByRole("button", { name: "Right" }).click();
  await answers(page).getByText("The server keeps it.").waitFor();
  await answers(page).getByRole("button", { name: "Wrong" }).click({ force: true }); // too late
  await go(page, "Outcomes");
  const region = page.getByRole("region", { name: "Reliability" }).first();
  await region.getByText(/^1 answer is marked, 1 of them right/).waitFor();
  await region.getByRole("img", { name: /1 answers of about 64 %: 100 % right/ }).waitFor();
  assert.equal(reports.length, 1);
  assert.match(JSON.stringify(reports[0]), /^{"id":"decision-\w+","index":0,"correct":true}$/);
  await sound(page);
  await close();
});

test("a server that keeps no outcomes is said, and thumbs count on the page", async () => {
  const { page, close } = await open(browser, server.url);
  await page.route("**/v1/outcomes", (route) => route.fulfill({ status: 404,
    json: { error: { message: "this server keeps no answers; start it with --outcomes" } } }));
  await ask(page);
  await answers(page).getByRole("button", { name: "Wrong" }).click();
  await answers(page).getByText("Counted on this page only: the server keeps no outcomes.").waitFor();
  await go(page, "Outcomes");
  await page.getByText("This server keeps no outcomes").waitFor();
  await page.getByText(/^1 answer is marked, 0 of them right/).waitFor();
  await close();
});

for (const scheme of ["light", "dark"]) {
  for (const size of [WIDE, PHONE]) {
    test(`every page is sound: ${scheme}, ${size.width} pixels`, async () => {
      const { page, close } = await open(browser, server.url, { scheme, size });
      await ask(page);
      await answers(page).getByRole("article").waitFor();
      await sound(page);
      await answers(page).getByRole("button", { name: "Right" }).click();
      await go(page, "Chat");
      await page.getByLabel("Message").fill("Hello");
      await page.getByRole("button", { name: "Send" }).click();
      await page.getByText("The answer is complete.").waitFor();
      await page.locator("#messages .token").first().click();
      await sound(page);
      await go(page, "Meanings");
      await page.getByRole("button", { name: "Draw samples" }).click();
      await page.getByRole("region", { name: "Meanings" }).getByRole("article").waitFor();
      await sound(page);
      await go(page, "Outcomes");
      await sound(page);
      await close();
    });
  }
}

test("everything is reached with the Tab key, in the order of the page", async () => {
  const { page, close } = await open(browser, server.url);
  await page.evaluate(() => document.activeElement.blur());
  const reached = [];
  for (let i = 0; i < 18; i++) {
    await page.keyboard.press("Tab");
    reached.push(await page.evaluate(() => (document.activeElement.innerText || document.activeElement.name || document.activeElement.id).split("\n")[0]));
  }
  const order = ["Skip to the content", "Ask", "Chat", "Meanings", "Outcomes", "kind", "input", "instructions", "options", "More settings", "Ask", "Show an example", "The API"];
  const places = order.reduce((found, name) => [...found, reached.indexOf(name, (found.at(-1) ?? -1) + 1)], []);
  assert.ok(!places.includes(-1), JSON.stringify(reached));
  await close();
});
