"""What the server answers to decisions, OpenAI's and vLLM's, as /openapi.json describes it. Nats throughout."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from server.http.replies import DecisionRecord
from server.services.options import Reason


class _Answer(BaseModel):
    name: str | None
    uncertainty: DecisionRecord


class PredicateAnswer(_Answer):
    """How likely the statement is true."""

    type: Literal["predicate"]
    probability: float


class ChoiceProbability(BaseModel):
    value: str | bool
    probability: float


class ChoiceAnswer(_Answer):
    type: Literal["choice"]
    choice: str | bool
    confidence: float
    probabilities: list[ChoiceProbability]


class ScoreProbability(BaseModel):
    label: str
    value: int
    probability: float


class ScoreAnswer(_Answer):
    """`score`: the expected number of the level, from 0."""

    type: Literal["score"]
    score: float
    confidence: float
    probabilities: list[ScoreProbability]


class RefusedRecord(DecisionRecord):
    """What the answer would have been, and why it is not given: the model does not know enough (unfamiliar), or the
    question leaves it open (ambiguous)."""

    reason: Reason


class RefusalAnswer(BaseModel):
    """The question is not answered: `max_risk` forbids it."""

    type: Literal["refusal"]
    name: str | None
    uncertainty: RefusedRecord


class InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    reasoning_tokens: int


class DecisionUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class DecisionReply(BaseModel):
    """An answer to each question, in order."""

    id: str
    object: Literal["decision"]
    created: int
    model: str
    answers: list[Annotated[PredicateAnswer | ChoiceAnswer | ScoreAnswer | RefusalAnswer, Field(discriminator="type")]]
    usage: DecisionUsage


class _SystemOneAnswer(BaseModel):
    """`confidence`: that of the most probable option times `label_mass`."""

    probabilities: dict[str, float]
    confidence: float
    uncertainty: DecisionRecord


class SystemOneChoiceAnswer(_SystemOneAnswer):
    type: Literal["choice"]
    choice: str


class SystemOneNoulAnswer(_SystemOneAnswer):
    """`noul`: the probability of yes."""

    type: Literal["noul"]
    noul: float


class SystemOneScoreAnswer(_SystemOneAnswer):
    """`score`: the expected number of the level, from 0."""

    type: Literal["score"]
    score: float
    legend: dict[str, str]


class SystemOneDiagnostics(BaseModel):
    """What the model would say if it were free to: `label_mass` is the probability that it begins with an option."""

    label_mass: float
    argmax_is_label: bool


class SystemOneUsage(BaseModel):
    input_tokens: int
    output_tokens: int


class SystemOneReply(BaseModel):
    """An answer to each question, by its name."""

    id: str
    object: Literal["structured_decision"]
    created: int
    model: str
    answers: dict[
        str,
        Annotated[SystemOneChoiceAnswer | SystemOneNoulAnswer | SystemOneScoreAnswer, Field(discriminator="type")],
    ]
    usage: SystemOneUsage
    diagnostics: dict[str, SystemOneDiagnostics]
