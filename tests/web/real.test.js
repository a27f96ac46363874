// The page against a real server with the shipped posteriors. $SHOTS: a folder for screenshots.

import { after, before, test } from "node:test";
import assert from "node:assert/strict";
import { PHONE, WIDE, launch, open, serve, sound } from "./browser.js";

let browser, server;
const SHOTS = process.env.SHOTS;

before(async () => { [browser, server] = await Promise.all([launch(), serve("tests.web.real")]); }, { timeout: 300_000 });
after(async () => { await browser.close(); await server.stop(); });

const go = (page, name) => page.getByRole("navigation").getByRole("link", { name }).click();

async function shot(page, name, options = {}) {
  if (SHOTS) await page.screenshot({ path: `${SHOTS}/${name}.png`, ...options });
}

for (const [scheme, size] of [["light", WIDE], ["dark", PHONE]]) {
  test(`a decision, a chat, meanings and an outcome: ${scheme}, ${size.width} pixels`, { timeout: 180_000 }, async () => {
    const { page, close } = await open(browser, server.url, { scheme, size });
    page.setDefaultTimeout(90_000);
    const name = (part) => `${part}-${scheme}`;

    await page.getByRole("button", { name: "Ask", exact: true }).click();
    const answers = page.getByRole("region", { name: "Answers" });
    await answers.getByRole("img", { name: /^payments: \d+ %, 90 % interval/ }).waitFor();
    await answers.getByText("Calibrated on 300 held-out rows").waitFor();
    await sound(page);
    await shot(page, name("ask"), { fullPage: size === PHONE });
    await answers.getByRole("button", { name: "Right" }).click();
    await answers.getByText("The server keeps it.").waitFor();

    await page.getByText("More settings").first().click();
    await page.getByLabel("support: theta* alone (MAP)").check();
    await page.getByLabel("support: mixture of particles").check();
    await page.getByRole("button", { name: "Ask", exact: true }).click();
    await answers.getByRole("table", { name: /Side by side/ }).waitFor();
    assert.equal(await answers.getByRole("article").count(), 3);
    await sound(page);
    await shot(page, name("compare"), { fullPage: true });

    await page.getByLabel("Refuse above an error of, %").fill("1");
    const also = page.locator('[name="also"]:checked');
    while (await also.count()) await also.first().uncheck();
    await page.getByRole("button", { name: "Ask", exact: true }).click();
    await page.getByText("rows of its calibration do not prove an error of at most 0.01").waitFor();

    await go(page, "Chat");
    await page.getByLabel("Message").fill("What is the capital of Australia?");
    await page.getByRole("button", { name: "Send" }).click();
    const tokens = page.locator("#messages .token");
    await tokens.nth(3).waitFor();
    await page.getByText("The answer is complete.").waitFor();
    const written = (await tokens.allInnerTexts()).join("");
    assert.ok(written.length > 10 && !written.includes("undefined"), written);
    await tokens.nth(3).click();
    const aside = page.getByRole("region", { name: "The token" });
    assert.equal(await aside.locator("figure").last().locator("li").count(), 8);
    await sound(page);
    await shot(page, name("chat"));

    await go(page, "Meanings");
    await page.getByRole("button", { name: "Draw samples" }).click();
    await page.getByRole("figure", { name: "What 16 samples mean" }).waitFor();
    await sound(page);
    await shot(page, name("meanings"), { fullPage: size === PHONE });

    await go(page, "Outcomes");
    await page.getByText(/^1 answer is marked/).waitFor();
    await shot(page, name("outcomes"), { fullPage: true });
    await close();
  });
}
