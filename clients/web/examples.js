// Examples to begin with. Those of `support` are what it was fitted to.

const BANK = "The machine swallowed my card, and now there are payments on my statement that I did not make.";
const MEAL = "I waited an hour for a table. The soup was worth it.";
const DEPARTMENTS = ["account", "cards", "cash", "exchange", "payments", "security", "top-ups", "transfers"];
const DECISIONS = {
  choice: { inputs: { input: MEAL }, instructions: "How does the guest feel?", options: ["angry", "glad | would come again"] },
  predicate: { inputs: { input: MEAL }, instructions: "The guest had to wait." },
  score: { inputs: { input: MEAL }, instructions: "How good was the food?", options: ["bad", "fair", "good"] },
};
const SUPPORT = {
  choice: { inputs: { input: BANK }, instructions: "Which department should answer?", options: DEPARTMENTS },
  predicate: { inputs: { input: BANK }, instructions: "The customer may be a victim of fraud or theft." },
  score: { inputs: { input: BANK }, instructions: "How soon does the customer need help?", options: ["any time", "today", "at once"] },
};

/** An example of this kind of question for a model. */
export function example(model, kind) {
  if (kind === "own") {
    const inputs = Object.fromEntries(model.fields.map((name, i) => [name, i ? "" : "The food was good, the service was slow."]));
    return { kind, inputs };
  }
  return { kind, ...(model.task === "decision" ? SUPPORT : DECISIONS)[kind] };
}
