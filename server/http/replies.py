"""What the server answers, as /openapi.json describes it. Nats throughout."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from server.services.options import PredictiveName


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
    """One model name. `parent`: the base; `max_model_len`: longest prompt plus answer in tokens; `predictives`: its
    default first."""

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


class Candidate(_Reply):
    """One candidate answer. `interval`: central, of its probability over the posterior."""

    answer: str
    probability: float
    variance: float
    std: float
    interval: list[float]


class AnswerRecord(_Reply):
    """A posterior predictive distribution over candidate answers; `answer` is the one that `confidence`, `logprob`,
    `variance` and `mc_error` are about."""

    posterior: str | None
    predictive: PredictiveName
    particles: int
    answer: str
    confidence: float
    calibrated: bool
    calibration: dict[str, Any] | None
    logprob: float
    answers: list[Candidate]
    covariance: list[list[float]]
    entropy: Entropy
    variance: Variance
    effective_particles: float
    mc_error: float


class TextRecord(_Reply):
    """The uncertainty of a text; of a mixture also logprob, entropy, effective_particles and more."""

    posterior: str | None
    predictive: PredictiveName
    calibrated: bool
    calibration: dict[str, Any] | None


class Usage(_Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PredictiveItem(AnswerRecord):
    index: int


class PredictiveReply(BaseModel):
    id: str
    object: Literal["predictive"]
    created: int
    model: str
    posterior: str | None
    predictive: PredictiveName
    particles: int
    data: list[PredictiveItem]
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
