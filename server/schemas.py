"""What clients may send, with its limits: the bodies of our routes.

Inside `uncertainty` and in POST /v1/predictive an unknown field is an error. Chat and completion requests are OpenAI's:
at their top level a field that nobody knows is ignored, and one of vLLM's that is not listed here is refused unless it
only spells out vLLM's default (server/engine/fields.py). vLLM checks the fields again, with the model at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from posterior.predictive.decoding import Mixing
from server.errors import bad_request

MAX_ANSWERS = 128  # per request: vLLM's logprob_token_ids takes no more
MAX_PROMPTS = 256  # per request
MAX_CHOICES = 128  # `n`, as OpenAI has it
MAX_SEQUENCES = 8192  # sequences of one request: prompts x particles x candidate prefixes, or x n for text
MAX_SCORED = 2**16  # tokens of an echoed prompt x particles: hidden states that are kept until all have read it
MAX_NUMBERS = 2**20  # entries of all covariances in one response
MAX_BODY_BYTES = 4 * 2**20
MAX_TEMPERATURE = 100.0
MAX_INTEGER = 2**63 - 1

Kind = Literal["chat", "completion"]
PredictiveName = Literal["mixture", "linearized", "map"]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]
TokenIds = Annotated[list[Token], Field(min_length=1)]
Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
PromptIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]


def check_size(prompts: int, n: int, particles: int) -> None:
    """Raises ApiError 400 for a request of more texts than are written at a time."""
    sequences = prompts * n * particles
    if sequences > MAX_SEQUENCES:
        raise bad_request(
            f"{prompts} prompts x n = {n} x {particles} particles are {sequences} sequences; one request may have "
            f"{MAX_SEQUENCES}: send fewer prompts, or ask for fewer choices or 'particles'",
            "n",
        )


class Uncertainty(BaseModel):
    """The object `uncertainty` of chat and completion requests."""

    model_config = ConfigDict(extra="forbid", strict=True)

    predictive: PredictiveName | None = Field(
        default=None, description="how the posterior is averaged; the model's first"
    )
    particles: Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None = Field(
        default=None, description="of the mixture; all"
    )
    answers: Annotated[list[str], Field(min_length=2, max_length=MAX_ANSWERS)] | None = Field(
        default=None, description="candidate answers, each with its leading space if it has one"
    )
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.9, description="of intervals and prediction sets"
    )
    per_particle: bool = Field(default=False, description="also what each particle says")
    mixing: Mixing | None = Field(default=None, description="of text: 'sequence' (exact, the default) or 'token'")
    tokens: bool | None = Field(
        default=None, description="of text: a record for each token; by default on streams only"
    )


class PredictiveRequest(Uncertainty):
    """The body of POST /v1/predictive: one kind of prompt, and what is wanted of each."""

    model: str
    inputs: Annotated[list[dict[str, str]], Field(min_length=1, max_length=MAX_PROMPTS)] | None = Field(
        default=None, description="the fields of the posterior's template"
    )
    prompts: Prompts | None = None
    messages: Annotated[list[Messages], Field(min_length=1, max_length=MAX_PROMPTS)] | None = Field(
        default=None, description="conversations, each as chat completions have it"
    )

    @model_validator(mode="after")
    def _one_kind_of_prompt(self) -> PredictiveRequest:
        given = [name for name in ("inputs", "prompts", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of 'inputs', 'prompts' and 'messages'; got {given or 'none'}")
        return self


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextRequest(BaseModel):
    """What chat and completion requests have in common: OpenAI's fields, then vLLM's."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    uncertainty: Uncertainty | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)] | None = None
    stop: str | list[str] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Token] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[Token] | None = None
    bad_words: list[str] | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    structured_outputs: dict[str, Any] | None = None


class ChatRequest(TextRequest):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    # vLLM's
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = Field(
        default=None, description="values of the base's own chat template, such as enable_thinking"
    )


class CompletionRequest(TextRequest):
    """The body of POST /v1/completions."""

    prompt: str | TokenIds | Prompts | PromptIds
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _said_once(cls, value: Any, check: Callable[[Any], Any]) -> Any:
        try:
            return check(value)
        except ValidationError:  # one complaint for each form that it could have had
            raise ValueError(
                f"must be a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} texts, or of as many lists of "
                "token ids"
            ) from None


BODIES: dict[Kind, type[ChatRequest] | type[CompletionRequest]] = {"chat": ChatRequest, "completion": CompletionRequest}
