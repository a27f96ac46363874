import { PosteriorClient, isText } from "./index.js";

const client = new PosteriorClient();

const decided = await client.decisions.create({
  model: "support",
  input: "The machine swallowed my card, and I fly at noon.",
  questions: [
    { type: "predicate", instructions: "The customer is in a hurry." },
    { type: "choice", instructions: "Which department?", choices: [{ value: "cards" }, { value: "loans" }] },
  ],
  uncertainty: { coverage: 0.8 },
});
for (const { type, uncertainty } of decided.answers) {
  console.log(type, uncertainty.answer, uncertainty.confidence, uncertainty.entropy.epistemic);
}

const stream = await client.chat.completions.create({
  model: "support",
  messages: [{ role: "user", content: "What is the capital of Australia?" }],
  max_tokens: 20,
  stream: true,
});
for await (const { choices } of stream) {
  for (const { delta, uncertainty } of choices) {
    const tokens = isText(uncertainty) ? (uncertainty.tokens ?? []) : [];
    console.log(delta.content, tokens.map(({ entropy }) => entropy.epistemic));
  }
}
