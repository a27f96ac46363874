/** `uncertainty` in the types of OpenAI's SDK: what chats and completions may ask, and what their replies say. */

import type { components } from "./openapi.js";

type Schemas = components["schemas"];
export type TextUncertainty = Schemas["TextUncertainty"];
/** A posterior predictive over candidate answers: the request named `answers`. Entropies are in nats. */
export type AnswerRecord = Schemas["AnswerRecord"];
/** The uncertainty of a text, or of a chunk of it. Entropies are in nats. */
export type TextRecord = Schemas["TextRecord"] & { answers?: never };
export type Uncertainty = AnswerRecord | TextRecord;

interface Asked {
  /** Which predictive, which answers, which records: see docs/answers.md. */
  uncertainty?: TextUncertainty | null;
}

interface Answered {
  /** Not of the base model's text, nor of a chunk without tokens. */
  uncertainty?: Uncertainty | null;
}

/** Whether a record is of the candidate answers that the request named. */
export function isAnswer(record: Uncertainty | null | undefined): record is AnswerRecord {
  return Array.isArray(record?.["answers"]);
}

/** Whether a record is of a text, or of a chunk of it. */
export function isText(record: Uncertainty | null | undefined): record is TextRecord {
  return Boolean(record) && !isAnswer(record);
}

declare module "openai/resources/chat/completions/completions" {
  interface ChatCompletionCreateParamsBase extends Asked {}
  namespace ChatCompletion {
    interface Choice extends Answered {}
  }
  namespace ChatCompletionChunk {
    interface Choice extends Answered {}
  }
}

declare module "openai/resources/completions" {
  interface CompletionCreateParamsBase extends Asked {}
  interface CompletionChoice extends Answered {}
}
