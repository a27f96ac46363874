/**
 * Client of Posterior Server: OpenAI's SDK plus posterior predictive distributions.
 *
 * Every type is of the server's /openapi.json (src/openapi.ts). Errors are the SDK's own.
 */

import OpenAI, { type APIPromise, type ClientOptions } from "openai";
import type { components } from "./openapi.js";

export * from "./uncertainty.js";

export type Schemas = components["schemas"];
export type Question = Schemas["DecisionRequest"]["questions"][number];
export type DecisionAnswer = Schemas["DecisionReply"]["answers"][number];
export type Outcome = Schemas["Outcome"];

/** `POST /v1/predictive` without `texts`: a choice for each prompt. */
export type ChoiceRequest = Omit<Schemas["PredictiveRequest"], "texts">;
export type ChoiceReply = Omit<Schemas["PredictiveReply"], "data"> & { data: Schemas["PredictiveItem"][] };
/** `POST /v1/predictive` with `texts`: how probable each text is after its prompt. */
export type ScoreRequest = Omit<Schemas["PredictiveRequest"], "texts" | "answers"> & { texts: string[] };
export type ScoreReply = Omit<Schemas["PredictiveReply"], "data"> & { data: Schemas["TextItem"][] };

type Options = OpenAI.RequestOptions;

/**
 * A Posterior Server. All of OpenAI's routes are the SDK's own; chats and completions also take and return `uncertainty`.
 *
 * The URL is `baseURL`, else $POSTERIOR_BASE_URL, else http://127.0.0.1:8000/v1. The key is `apiKey`, else $POSTERIOR_API_KEY.
 */
export class PosteriorClient extends OpenAI {
  constructor(options: ClientOptions = {}) {
    super({
      baseURL: process.env["POSTERIOR_BASE_URL"] || "http://127.0.0.1:8000/v1",
      // Without these the SDK would send $OPENAI_API_KEY and its kind, secrets of someone else, to this server.
      apiKey: process.env["POSTERIOR_API_KEY"] || "none",
      adminAPIKey: null,
      organization: null,
      project: null,
      ...options,
    });
  }

  /** The posterior predictive over the answers, or the probabilities of `texts`, for many prompts in one call. */
  predictive(body: ScoreRequest, options?: Options): APIPromise<ScoreReply>;
  predictive(body: ChoiceRequest, options?: Options): APIPromise<ChoiceReply>;
  predictive(body: ChoiceRequest | ScoreRequest, options?: Options): APIPromise<unknown> {
    return this.post("/predictive", { ...options, body });
  }

  /** OpenAI's decisions: typed questions about one input. A question that `max_risk` leaves to a person has a refusal. */
  readonly decisions = {
    create: (body: Schemas["DecisionRequest"], options?: Options): APIPromise<Schemas["DecisionReply"]> =>
      this.post("/decisions", { ...options, body }),
  };

  /** What turned out to be true of earlier answers, where the server keeps them (`posterior serve --outcomes`). */
  readonly outcomes = {
    /** What became of each outcome. A second report of the same is "known". */
    report: (outcomes: Outcome[], options?: Options): APIPromise<Schemas["OutcomesReply"]> =>
      this.post("/outcomes", { ...options, body: { outcomes } }),

    /** What the outcomes of this key's answers say, with the key of an admin those of all keys. */
    summary: (options?: Options): APIPromise<Schemas["OutcomesReport"]> => this.get("/outcomes/report", options),

    /** Delete the answers of the reply `id`, and their outcomes. */
    delete: (id: string, options?: Options): APIPromise<Schemas["OutcomesDeleted"]> =>
      this.delete(`/outcomes/${encodeURIComponent(id)}`, options),
  };
}
