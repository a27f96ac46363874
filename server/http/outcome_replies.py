"""What is sent back about outcomes, for OpenAPI: what became of each, and what all of them say."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from server.services.options import PredictiveName


class OutcomeResult(BaseModel):
    """What became of an outcome. `correct`: whether the answer was right, by the outcome that is stored; null where
    none is. `message`: why it was not stored."""

    id: str
    index: int
    status: Literal["stored", "known", "unknown", "conflict", "invalid"]
    correct: bool | None
    message: str | None = None


class OutcomesReply(BaseModel):
    """What became of each outcome, in order."""

    object: Literal["outcomes"]
    data: list[OutcomeResult]


class OutcomesDeleted(BaseModel):
    """The answers of the reply `id`, and their outcomes, are deleted."""

    id: str
    object: Literal["outcomes.deleted"]
    deleted: bool


class Figure(BaseModel):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


class Promised(BaseModel):
    """The means of what requests asked for."""

    coverage: float | None = None
    max_risk: float | None = None


class OutcomesFigures(BaseModel):
    """What `n` outcomes say: of rightness; of the confidence; of prediction sets; of what `max_risk` let pass."""

    n: int
    accuracy: Figure | None = None
    nll: Figure | None = None
    brier: Figure | None = None
    ece: Figure | None = None
    gap: Figure | None = None
    coverage: Figure | None = None
    risk: Figure | None = None
    promised: Promised


class Samples(BaseModel):
    """All outcomes of the window, and those whose label the server asked for."""

    all: OutcomesFigures | None = None
    requested: OutcomesFigures | None = None


class Labels(BaseModel):
    """How many labels the server asked for among the answers of the window, and how many of these came."""

    requested: int
    reported: int


class DriftRecord(BaseModel):
    """How far `n` answers are from the `held` rows of the calibration: the largest difference of shares."""

    n: int
    held: int
    distance: float
    p_value: float


class DriftRecords(BaseModel):
    confidence: DriftRecord | None = None
    entropy: DriftRecord | None = None
    familiarity: DriftRecord | None = None


class ExchangeabilityRecord(BaseModel):
    """Evidence against exchangeability after `n` labels, log10: `now` and at most. `rejected`: what the calibration
    promises no longer holds."""

    n: int
    now: float
    largest: float
    rejected: bool


class Missing(BaseModel):
    """Why something is not known."""

    drift: str | None = None
    exchangeability: str | None = None


class OutcomesOfKind(BaseModel):
    """What outcomes say of the answers of one posterior, predictive and kind of question."""

    posterior: str
    predictive: PredictiveName
    kind: Literal["answers", "predicate", "choice", "score", "text"]
    outcomes: Samples
    labels: Labels
    drift: DriftRecords
    exchangeability: ExchangeabilityRecord | None
    missing: Missing


class OutcomesReport(BaseModel):
    """`window`: how many of the newest answers and outcomes of each posterior count, or of how many days ("30d")."""

    object: Literal["outcomes.report"]
    window: str
    data: list[OutcomesOfKind]
