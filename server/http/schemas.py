"""What clients may send, with its limits: the bodies of our routes.

Inside `uncertainty`, in the questions of decisions, in POST /v1/predictive and in POST /v1/outcomes an unknown field is
an error. Decision, chat and completion requests are OpenAI's: at their top level a field that nobody knows is ignored.
In those for text one of vLLM's that is not listed here is refused unless it only spells out vLLM's default
(server/engine/fields.py). vLLM checks their fields again, with the model at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from posterior.data.decisions import MAX_CHOICES as MAX_OPTIONS
from posterior.data.decisions import MAX_LEVELS, MAX_QUESTIONS, Input, Question
from server.engine import Kind
from server.services.options import MAX_INTEGER, DecisionUncertainty, TextUncertainty, Uncertainty

MAX_PROMPTS = 256  # per request
MAX_CHOICES = 128  # `n`, as OpenAI has it
MAX_BODY_BYTES = 4 * 2**20
MAX_TEMPERATURE = 100.0
MAX_OUTCOMES = 1000  # per request
MAX_ID = 256  # characters of a reply's id
MAX_NAME = 256  # characters of a posterior's name
DEFAULT_TOKENS = 16  # of a completion, as OpenAI and vLLM have it

Token = Annotated[int, Field(ge=0, lt=2**31)]
Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]
TokenIds = Annotated[list[Token], Field(min_length=1)]
Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
PromptIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]


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
    texts: Texts | None = Field(
        default=None, description="one for each prompt, to be scored, each with its leading space if it has one"
    )

    @model_validator(mode="after")
    def _one_kind_of_prompt(self) -> PredictiveRequest:
        given = {name: getattr(self, name) for name in ("inputs", "prompts", "messages")}
        given = {name: prompts for name, prompts in given.items() if prompts is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of 'inputs', 'prompts' and 'messages'; got {[*given] or 'none'}")
        if self.texts is not None and self.answers is not None:
            raise ValueError("'texts' are scored, and one of 'answers' is chosen: give one of the two")
        [(name, prompts)] = given.items()
        if self.texts is not None and len(self.texts) != len(prompts):
            raise ValueError(f"'texts' has {len(self.texts)} and {name!r} {len(prompts)}; give a text for each prompt")
        return self


class DecisionRequest(BaseModel):
    """The body of POST /v1/decisions."""

    model_config = ConfigDict(strict=True)

    model: str
    input: Input
    questions: Annotated[list[Question], Field(min_length=1, max_length=MAX_QUESTIONS)]
    uncertainty: DecisionUncertainty | None = None
    prompt_cache_key: str | None = Field(default=None, description="without effect")
    prompt_cache_options: dict[str, Any] | None = Field(default=None, description="without effect")
    safety_identifier: str | None = Field(default=None, description="without effect")


class _SystemOneQuestion(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    instructions: Any = ""


class SystemOneChoice(_SystemOneQuestion):
    """`criteria`: the options, each with its description or null."""

    type: Literal["choice"]
    criteria: Annotated[dict[str, Any], Field(min_length=2, max_length=MAX_OPTIONS)]


class NoulCriteria(BaseModel):
    """What yes and no mean."""

    model_config = ConfigDict(extra="forbid", strict=True)

    true: Any = None
    false: Any = None


class SystemOneNoul(_SystemOneQuestion):
    """Yes or no."""

    type: Literal["noul"]
    criteria: NoulCriteria | None = None


class SystemOneScore(_SystemOneQuestion):
    """`criteria`: the levels, from the first to the last."""

    type: Literal["score"]
    criteria: Annotated[list[Any], Field(min_length=2, max_length=MAX_LEVELS)]


SystemOneQuestion = Annotated[SystemOneChoice | SystemOneNoul | SystemOneScore, Field(discriminator="type")]
QuestionName = Annotated[str, Field(min_length=1)]


class SystemOneRequest(BaseModel):
    """The body of POST /v1/systemone, vLLM's protocol."""

    model_config = ConfigDict(strict=True)

    model: str | None = Field(default=None, description="the base, unless it is given")
    state: Any = Field(description="what the questions are about: text or JSON")
    questions: Annotated[dict[QuestionName, SystemOneQuestion], Field(min_length=1, max_length=MAX_QUESTIONS)]
    instructions: str | None = Field(default=None, description="stands ahead of the state")
    uncertainty: Uncertainty | None = None
    request_id: str | None = None
    images: list[str] | None = Field(default=None, description="not served")
    audio: list[str] | None = Field(default=None, description="not served")
    videos: list[str] | None = Field(default=None, description="not served")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="not served")
    cache_salt: str | None = Field(default=None, description="not served")
    priority: int = Field(default=0, description="not served")


class Outcome(BaseModel):
    """What turned out to be true of an earlier answer: its true option, or whether it was right."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str, Field(min_length=1, max_length=MAX_ID)] = Field(description="of the reply")
    index: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="of the answer in the reply: its place in 'data', 'answers' or 'choices'"
    )
    answer: StrictStr | StrictBool | StrictInt | None = Field(
        default=None, description="the true option of the question"
    )
    correct: bool | None = Field(default=None, description="whether the answer was right")

    @model_validator(mode="after")
    def _one_truth(self) -> Outcome:
        if (self.answer is None) == (self.correct is None):
            raise ValueError("give exactly one of 'answer', the true option, and 'correct', true or false")
        return self


class OutcomesRequest(BaseModel):
    """The body of POST /v1/outcomes with several outcomes; one alone is sent as it is."""

    model_config = ConfigDict(extra="forbid", strict=True)

    outcomes: Annotated[list[Outcome], Field(min_length=1, max_length=MAX_OUTCOMES)]


class LoadRequest(BaseModel):
    """The body of POST /v1/posteriors: the name of a folder among the posteriors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name


class AliasRequest(BaseModel):
    """The body of PUT /v1/aliases/{name}: where it leads, or that it leads to where it led before."""

    model_config = ConfigDict(extra="forbid", strict=True)

    posterior: Name | None = Field(default=None, description="name@hash, or the name where one version is loaded")
    rollback: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_target(self) -> AliasRequest:
        if (self.posterior is None) == (self.rollback is None):
            raise ValueError("give exactly one of 'posterior', a name@hash, and 'rollback', true")
        return self


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class TextRequest(BaseModel):
    """What chat and completion requests have in common: OpenAI's fields, then vLLM's."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    uncertainty: TextUncertainty | None = None
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

    @property
    def prompts(self) -> int:
        """How many texts are continued."""
        return 1

    @property
    def counts_usage(self) -> bool:
        """Whether a stream of it ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def limits(self) -> dict[str, int]:
        """The most tokens that a text may have, by the field that says so."""
        given = {name: getattr(self, name, None) for name in ("max_completion_tokens", "max_tokens")}
        return {name: limit for name, limit in given.items() if limit is not None}

    @property
    def longest(self) -> int | None:
        """The most tokens that a text can have, where that is not left to the context."""
        return max(self.limits.values(), default=None)


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

    @property
    def prompts(self) -> int:
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return len(self.prompt) if several else 1

    @property
    def longest(self) -> int | None:
        return super().longest if "max_tokens" in self.model_fields_set else DEFAULT_TOKENS

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
FIELDS: Mapping[Kind, frozenset[str]] = {kind: frozenset(model.model_fields) for kind, model in BODIES.items()}
