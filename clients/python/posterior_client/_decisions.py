"""Typed questions and their answers: `POST /v1/decisions`. C options of a question."""

from dataclasses import dataclass
from typing import Annotated, Literal, TypedDict

from pydantic import Field

from posterior_client._types import Predictive, PredictiveName, Probable

Value = str | bool | int  # of an option: a choice's own, true or false, or the number of a level
Reason = Literal["ambiguous", "unfamiliar"]


class UncertaintyOptions(TypedDict, total=False):
    """What a request for decisions may say of its uncertainty. What is left out, the server decides.

    predictive: which predictive; default the posterior's best.
    particles: how many particles a mixture uses; "auto": as many as the answer needs.
    per_particle: also return each particle's distribution.
    coverage: of the credible intervals and prediction sets, in (0, 1).
    max_risk: answer only where the error among answered questions is at most this, in (0, 1); else a `Refusal`.
    orders: ask each question in so many orders of its options, and average.
    """

    predictive: PredictiveName
    particles: int | Literal["auto"]
    per_particle: bool
    coverage: float
    max_risk: float
    orders: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Option(Probable):
    """One option of a question, by its value."""

    answer: Value


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """`n` orders of the options were averaged; `total_variation` is the largest distance of one from the average."""

    n: int
    total_variation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionUncertainty(Predictive):
    """The posterior predictive over the options of a question.

    `answers` [C] are in the order of the question, of a predicate true first; `covariance` [C, C] is left out where
    there are many. `prediction_set`, where there is a calibration, holds the true answer at the requested coverage.
    `reason` is there where the question was not answered: "unfamiliar" if few held-out rows are as strange (or, where
    there are none, if more training rows would help), else "ambiguous".
    """

    answer: Value
    answers: tuple[Option, ...]
    covariance: tuple[tuple[float, ...], ...] | None = None
    prediction_set: tuple[Value, ...] | None = None
    orders: Orders | None = None
    reason: Reason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decided:
    name: str | None
    uncertainty: DecisionUncertainty


@dataclass(frozen=True, slots=True, kw_only=True)
class PredicateAnswer(_Decided):
    """`probability`: that the statement is true."""

    type: Literal["predicate"]
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceProbability:
    """An option of a choice and its probability."""

    value: str | bool
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceAnswer(_Decided):
    """`choice`: the most probable option, `confidence` its probability; `probabilities` [C] in the order asked."""

    type: Literal["choice"]
    choice: str | bool
    confidence: float
    probabilities: tuple[ChoiceProbability, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelProbability:
    """A level of a score, its number (from 0) and its probability."""

    label: str
    value: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreAnswer(_Decided):
    """`score`: the expected number of the level; `confidence`: the largest probability; `probabilities` [C]."""

    type: Literal["score"]
    score: float
    confidence: float
    probabilities: tuple[LevelProbability, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal(_Decided):
    """A question that `max_risk` leaves to a person. `uncertainty` holds the answer that it would have had, and the
    reason."""

    type: Literal["refusal"]


DecisionAnswer = Annotated[PredicateAnswer | ChoiceAnswer | ScoreAnswer | Refusal, Field(discriminator="type")]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionUsage:
    """Tokens of all prompts, and of texts written: none."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionResponse:
    """Answer of `POST /v1/decisions`: one for each question, in order. `created` is Unix seconds."""

    id: str
    created: int
    model: str
    answers: tuple[DecisionAnswer, ...]
    usage: DecisionUsage
