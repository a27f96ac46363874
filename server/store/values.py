"""What is stored, and what is reported: values, with nothing that runs. Entropies in nats, times in Unix seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from posterior.calibration.rightness import Features
from posterior.data.decisions import Value

Kind = Literal["answers", "predicate", "choice", "score", "text"]
Status = Literal["stored", "known", "unknown", "conflict", "invalid"]


@dataclass(frozen=True)
class Answer:
    """An answer as it was given, and what a calibration or a metric needs of it.

    kind: of the question: one of candidate `answers`, a decision's, or a text.
    key: what a calibration of such answers belongs to; None where none can be made of them.
    options, probability: of a question: the options, and the predictive's own probabilities, before calibration.
    best: the number of the option that was the answer. confidence: its probability, of a text that it is right, after
        calibration where `calibrated`; None where nothing tells.
    max_risk, refusal: the error that the request allowed, and why the question was therefore not answered.
    total, epistemic: entropies of the predictive, of a text the sums over its tokens.
    prediction_set: numbers of options, of `coverage`; None without a calibration.
    features: of a text (posterior/calibration/rightness.py).
    requested: whether the server asks for its label: at random, before anybody has seen the answer.
    """

    kind: Kind
    predictive: str
    particles: int
    dtype: str
    key: Mapping[str, Any] | None = None
    options: tuple[Value, ...] | None = None
    probability: tuple[float, ...] | None = None
    best: int | None = None
    confidence: float | None = None
    calibrated: bool = False
    max_risk: float | None = None
    refusal: str | None = None
    familiarity: float | None = None
    total: float | None = None
    epistemic: float | None = None
    prediction_set: tuple[int, ...] | None = None
    coverage: float | None = None
    features: Features | None = None
    requested: bool = False


@dataclass(frozen=True)
class Reply:
    """A reply with its answers by their place in it. owner: digest of the key that got it; posterior and hash: None of
    the base; request: its body, where that is kept."""

    owner: str
    id: str
    created: float
    model: str
    posterior: str | None
    hash: str | None
    base: str
    answers: Mapping[int, Answer]
    request: Mapping[str, Any] | None = None

    @property
    def size(self) -> int:
        """About how many values it holds."""
        body = 0 if self.request is None else len(json.dumps(self.request)) // 8
        return body + sum(32 + 2 * len(answer.options or ()) for answer in self.answers.values())


@dataclass(frozen=True)
class Reporter:
    """Whose key it is (`owner`), and whether it is an admin's, who may name any key's answers."""

    owner: str
    admin: bool = False


@dataclass(frozen=True)
class Report:
    """What turned out to be true of answer `item` of the reply `id`: the true option, or whether it was right."""

    id: str
    item: int = 0
    answer: Value | None = None
    correct: bool | None = None


@dataclass(frozen=True)
class Result:
    """What became of a report. correct: whether the answer was right, by the outcome that is stored; message: why the
    report was not stored; posterior: the answer's, if there is such an answer."""

    report: Report
    status: Status
    correct: bool | None = None
    message: str | None = None
    posterior: str | None = None
