// The TypeScript client on a real server with the shipped posteriors. `tsc` checks the types of what is written here.

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { createServer } from "node:http";
import { after, before, test } from "node:test";
import { promisify } from "node:util";
import { PosteriorClient, isAnswer, isText } from "../../../clients/typescript/dist/index.js";
import { serve } from "../../web/serve.js";

const KEY = "test-key"; // of tests/server/running.py
const EXAMPLE = new URL("../../../clients/typescript/dist/example.js", import.meta.url).pathname;
const MEAL = "The food was good, the service was slow.";
const BANK = "The machine swallowed my card, and now there are payments on my statement that I did not make.";

/** @type {Awaited<ReturnType<typeof serve>>} */
let server;
/** @type {PosteriorClient} */
let client;

before(async () => {
  server = await serve("tests.web.real");
  client = new PosteriorClient({ baseURL: `${server.url}/v1`, apiKey: KEY });
}, { timeout: 300_000 });
after(() => server.stop());

/** @param {number[]} numbers */
const sum = (numbers) => numbers.reduce((total, each) => total + each, 0);

test("a choice, with its intervals", async () => {
  const reply = await client.predictive({ model: "sentiment", inputs: [{ text: MEAL }, { text: "Awful." }], coverage: 0.8 });
  assert.equal(reply.data.length, 2);
  for (const { answers, entropy } of reply.data) {
    assert.ok(Math.abs(sum(answers.map(({ probability }) => probability)) - 1) < 1e-6);
    for (const { probability, interval: [low = NaN, high = NaN] } of answers) assert.ok(low <= probability && probability <= high);
    assert.ok(Math.abs(entropy.total - entropy.aleatoric - entropy.epistemic) < 1e-6);
  }
});

test("texts are scored", async () => {
  const { data: [text] } = await client.predictive({ model: "sentiment", prompts: ["The food was"], texts: [" good."], tokens: true });
  assert.equal(text?.text, " good.");
  assert.equal(text.confidence, null);
  assert.ok(Math.abs(sum((text.tokens ?? []).map(({ logprob }) => logprob)) - text.logprob) < 1e-4);
});

test("chats and completions take and return `uncertainty`", async () => {
  /** @type {[{role: "user", content: string}]} */
  const messages = [{ role: "user", content: MEAL }];
  const chosen = await client.chat.completions.create({ model: "support", messages, uncertainty: { answers: [" yes", " no"] } });
  const answer = chosen.choices[0]?.uncertainty;
  assert.ok(isAnswer(answer) && !isText(answer));
  assert.deepEqual(answer.answers.map((each) => each.answer), [" yes", " no"]);

  const written = await client.completions.create({ model: "support", prompt: "The food was", max_tokens: 3, uncertainty: { tokens: true } });
  const text = written.choices[0]?.uncertainty;
  assert.ok(isText(text) && !isAnswer(text));
  assert.equal(text.tokens?.length, 3);
  assert.equal(text.predictive, "mixture");

  const base = (await client.models.list()).data[0]?.id ?? "";
  const plain = await client.completions.create({ model: base, prompt: "The food was", max_tokens: 1 });
  assert.ok(!isText(plain.choices[0]?.uncertainty) && !isAnswer(plain.choices[0]?.uncertainty));
});

test("a stream brings a record of each token", async () => {
  const stream = await client.chat.completions.create({
    model: "support", messages: [{ role: "user", content: "What is the capital of Australia?" }], max_tokens: 5, stream: true,
    logprobs: true,
  });
  let records = 0, tokens = 0, information;
  for await (const { choices: [choice] } of stream) {
    tokens += choice?.logprobs?.content?.length ?? 0;
    const record = choice?.uncertainty;
    if (!isText(record)) continue;
    for (const { entropy, epistemic_variance: variance } of record.tokens ?? []) assert.ok(entropy.total >= 0 && variance >= 0);
    records += record.tokens?.length ?? 0;
    information = record.information ?? information;
  }
  assert.equal(records, tokens);
  assert.equal(records, 5);
  assert.ok(information !== undefined && information >= 0);
});

test("decisions, a refusal, and what turned out to be true", async () => {
  const body = {
    model: "support", input: BANK,
    questions: [{ type: /** @type {const} */ ("choice"), instructions: "Which department should answer?",
      choices: [{ value: "cards" }, { value: "payments" }, { value: "transfers" }] }],
  };
  const decided = await client.decisions.create(body);
  const [answer] = decided.answers;
  assert.ok(answer?.type === "choice");
  assert.equal(answer.choice, answer.uncertainty.answer);
  assert.deepEqual(answer.probabilities.map(({ value }) => value), ["cards", "payments", "transfers"]);

  const held = await client.decisions.create({ ...body, uncertainty: { max_risk: 0.3 } });
  for (const each of held.answers) if (each.type === "refusal") assert.match(each.uncertainty.reason, /ambiguous|unfamiliar/);

  const outcome = { id: decided.id, answer: "cards" };
  const { data: [stored] } = await client.outcomes.report([outcome]);
  assert.deepEqual([stored?.status, stored?.correct], ["stored", answer.choice === "cards"]);
  assert.equal((await client.outcomes.report([outcome])).data[0]?.status, "known");
  assert.ok((await client.outcomes.summary()).data.some(({ posterior }) => posterior.startsWith("support@")));
  await client.outcomes.delete(decided.id);
  await assert.rejects(client.outcomes.delete(decided.id), (/** @type {any} */ error) => error.code === "answer_not_found");
});

test("errors are the SDK's, with the server's message", async () => {
  const body = { model: "sentiment", inputs: [{ review: MEAL }] };
  await assert.rejects(client.predictive(body), (/** @type {any} */ error) => error instanceof PosteriorClient.BadRequestError
    && error.message.includes("field 'text' is missing"));
  const other = new PosteriorClient({ baseURL: `${server.url}/v1`, apiKey: "wrong" });
  await assert.rejects(other.predictive(body), PosteriorClient.AuthenticationError);
});

test("the environment names the server and the key, and secrets for OpenAI stay here", async () => {
  /** @type {import("node:http").IncomingHttpHeaders | undefined} */
  let headers;
  const listener = createServer((request, response) => {
    headers = request.headers;
    response.setHeader("Content-Type", "application/json").end(JSON.stringify({ data: [] }));
  });
  await new Promise((resolve) => listener.listen(0, "127.0.0.1", () => resolve(undefined)));
  const address = listener.address();
  assert.ok(address && typeof address === "object");
  const before = { ...process.env };
  try {
    for (const name of ["API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"]) process.env[`OPENAI_${name}`] = "secret";
    process.env["POSTERIOR_BASE_URL"] = `http://127.0.0.1:${address.port}/v1`;
    await new PosteriorClient().predictive({ model: "m", prompts: ["a"] });
    assert.equal(headers?.authorization, "Bearer none");
    process.env["POSTERIOR_API_KEY"] = "mine";
    await new PosteriorClient().decisions.create({ model: "m", input: "a", questions: [] });
    assert.equal(headers?.authorization, "Bearer mine");
    assert.ok(!JSON.stringify(headers).includes("secret"));
  } finally {
    process.env = before;
    listener.close();
  }
});

test("the example of the pages runs", async () => {
  const env = { ...process.env, POSTERIOR_BASE_URL: `${server.url}/v1`, POSTERIOR_API_KEY: KEY };
  const { stdout } = await promisify(execFile)(process.execPath, [EXAMPLE], { env, timeout: 120_000 });
  assert.match(stdout, /^predicate (true|false) 0\.\d+ /m);
  assert.match(stdout, /^choice (cards|loans) 0\.\d+ /m);
  assert.match(stdout, /\[ -?\d/);
});
