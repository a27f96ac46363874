// Debian's Chromium, and what every test of a page looks at.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
export const KEY = "test-key";
export const WIDE = { width: 1280, height: 900 };
export const PHONE = { width: 360, height: 740 };

export { serve } from "./serve.js";

export const launch = () => chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: FLAGS });

/** A page that fails the test for any error of a script, any refusal of the content-security policy, any other host. */
export async function open(browser, url, { size = WIDE, scheme = "light", key = KEY } = {}) {
  const context = await browser.newContext({ viewport: size, colorScheme: scheme, hasTouch: size === PHONE });
  const page = await context.newPage();
  const wrong = [];
  page.on("pageerror", (error) => wrong.push(String(error)));
  page.on("console", (message) => message.type() === "error" && !message.text().includes("status of") && wrong.push(message.text()));
  page.on("request", (request) => new URL(request.url()).protocol === "http:" && !request.url().startsWith(new URL(url).origin) && wrong.push(request.url()));
  await page.goto(url);
  if (key) await unlock(page, key);
  return { page, close: async () => { assert.deepEqual(wrong, []); await context.close(); } };
}

/** Gives the key that the page asks for. */
export async function unlock(page, key) {
  await page.getByLabel("API key").fill(key);
  await page.getByRole("button", { name: "Use the key" }).click();
  await page.waitForFunction(() => document.querySelector("#model").options.length > 1);
}

/** No violation of any of axe's rules, and no page that is wider than the screen. */
export async function sound(page) {
  await page.evaluate(AXE);
  const found = await page.evaluate(() => globalThis.axe.run(document));
  assert.deepEqual(found.violations.map(({ id, nodes }) => [id, nodes.map(({ target, failureSummary }) => `${target}: ${failureSummary}`)]), []);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  assert.equal(wide, 0, "the page scrolls sideways");
}
