"""What the server answers, as /openapi.json describes it. Nats throughout."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from posterior.data.decisions import Value
from posterior.predictive.decoding import Mixing
from server.services.options import MeaningName, PredictiveName, Reason, Returned


class _Reply(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every failure, in OpenAI's form."""

    error: ErrorDetail


class Status(BaseModel):
    status: Literal["ok", "ready"]


class Version(BaseModel):
    version: str


class ModelCard(_Reply):
    """One model name. `parent`: the base; `max_model_len`: longest prompt plus answer in tokens. Of a posterior also
    `predictives`: its default first; `task`: what it was fitted to; `fields`: those of its template."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Entropy(BaseModel):
    total: float
    aleatoric: float
    epistemic: float


class Variance(BaseModel):
    epistemic: float
    total: float


class _Probable(_Reply):
    probability: float
    variance: float
    std: float
    interval: list[float]


class Candidate(_Probable):
    """One candidate answer. `interval`: central, of its probability over the posterior."""

    answer: str


class LeftOut(BaseModel):
    """How many particles were left out, and what the stop was decided by: estimates of the total variation from all
    particles and of the probability of another answer. After a stop they are too low."""

    particles: int
    total_variation: float
    other_answer: float


class _Record(_Reply):
    posterior: str | None
    predictive: PredictiveName
    chosen_by: Literal["request", "held-out rows", "default"]
    particles: int
    confidence: float
    calibrated: bool
    calibration: dict[str, Any] | None
    logprob: float
    entropy: Entropy
    variance: Variance
    effective_particles: float
    mc_error: float
    familiarity: float | None = None
    left_out: LeftOut | None = None
    label: Literal["requested"] | None = None


class AnswerRecord(_Record):
    """A posterior predictive distribution over candidate answers; `answer` is the one that `confidence`, `logprob`,
    `variance` and `mc_error` are about."""

    answer: str
    answers: list[Candidate]
    covariance: list[list[float]]


class OptionCandidate(_Probable):
    """One option of a question, by its value: a choice's own, true or false, or a level's number."""

    answer: Value


class OrdersRecord(BaseModel):
    """How many orders of the options were averaged, and how far one of them was from the average."""

    n: int
    total_variation: float


class DecisionRecord(_Record):
    """A posterior predictive distribution over a question's options, as AnswerRecord has it."""

    answer: Value
    answers: list[OptionCandidate]
    covariance: list[list[float]] | None = None
    orders: OrdersRecord | None = None


class Meaning(BaseModel):
    """One meaning. `text`: its most probable sample; `interval`, `variance`: of its probability over the posterior;
    `standard_error`: of its probability, from the number of samples."""

    text: str
    probability: float
    interval: list[float]
    variance: float
    standard_error: float
    samples: int


class OtherMeanings(BaseModel):
    """The meanings that are not listed."""

    meanings: int
    samples: int
    probability: float


class SemanticRecord(BaseModel):
    """What the samples of a text mean, the most probable meaning first. `own`: the number of the returned text's
    meaning in `meanings` and those after them; null where no sample has it. `truncated`: how many samples max_tokens
    cut."""

    samples: int
    truncated: int
    meaning: MeaningName
    returned: Returned
    own: int | None
    entropy: Entropy
    effective_particles: float
    meanings: list[Meaning]
    others: OtherMeanings | None = None


class ValueProbability(BaseModel):
    """One of the values that the schema lists. `interval`, `variance`: of its probability over the posterior."""

    value: str | int | float | bool | None
    probability: float
    interval: list[float]
    variance: float


class FieldRecord(BaseModel):
    """One value of a text that is JSON. `path`: a JSON pointer. `alternatives`: the values that the schema lists, null
    if they were not scored; without them the numbers are those of the value's own tokens, as of a text."""

    path: str
    value: str | int | float | bool | None
    tokens: int
    probability: float
    interval: list[float]
    variance: float
    certainty: float
    logprob: float
    expected_logprob: float | None = None
    information: float | None = None
    entropy: Entropy
    effective_particles: float
    mc_error: float | None = None
    alternatives: list[ValueProbability] | None = None


class ParticleRecord(BaseModel):
    """By particle: its log-probability of the token or text, and its weight before the token or after the text."""

    logprob: list[float]
    weight: list[float]


class TokenRecord(BaseModel):
    """One token under the mixture. `entropy`: of its distribution over the whole vocabulary; `epistemic_variance`: of
    its probability over the particles; `effective_particles`: before it."""

    logprob: float
    entropy: Entropy
    epistemic_variance: float
    effective_particles: float
    per_particle: ParticleRecord | None = None


class PromptRecord(BaseModel):
    """A prompt that was scored: log p(prompt) = expected_logprob + information."""

    mean_token_probability: float
    logprob: float
    expected_logprob: float
    information: float
    entropy: Entropy
    effective_particles: float
    mc_error: float


class TextRecord(_Reply):
    """The uncertainty of a text. What is from `mixing` to `tokens` is of text under a mixture; a chunk of a stream has
    the `tokens` since the one before, and the last one the rest. `confidence`: the probability that it is right, where
    a calibration tells; `abstain`, `reason`: with max_risk; `label`: whether the server asks for its outcome."""

    posterior: str | None
    predictive: PredictiveName
    mixing: Mixing | None = None
    particles: int | None = None
    mean_token_probability: float | None = None
    logprob: float | None = None
    expected_logprob: float | None = None
    information: float | None = None
    entropy: Entropy | None = None
    effective_particles: float | None = None
    mc_error: float | None = None
    prompt: PromptRecord | None = None
    per_particle: ParticleRecord | None = None
    tokens: list[TokenRecord] | None = None
    confidence: float | None
    calibrated: bool
    calibration: dict[str, Any] | None
    abstain: bool | None = None
    reason: Reason | None = None
    semantic: SemanticRecord | None = None
    fields: list[FieldRecord] | None = None
    label: Literal["requested"] | None = None


class Usage(_Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PredictiveItem(AnswerRecord):
    index: int


class TextItem(TextRecord):
    """A text that was given, and how probable it is: log p(text) = expected_logprob + information, in nats."""

    index: int
    text: str
    mixing: Mixing
    particles: int
    logprob: float
    expected_logprob: float
    information: float
    entropy: Entropy
    effective_particles: float
    mc_error: float


class PredictiveReply(BaseModel):
    """`data`: of each prompt the answers to choose from or, of a request with `texts`, its text."""

    id: str
    object: Literal["predictive"]
    created: int
    model: str
    posterior: str | None
    predictive: PredictiveName
    particles: int
    data: list[PredictiveItem] | list[TextItem]
    usage: Usage


class Choice(_Reply):
    index: int
    finish_reason: str | None
    uncertainty: AnswerRecord | TextRecord | None = None


class ChatChoice(Choice):
    message: dict[str, Any]


class CompletionChoice(Choice):
    text: str


class ChatReply(_Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionReply(_Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
