"""A question of candidate answers, its answer, and the answer as its client gets it: values, with nothing that runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from posterior.calibration.records import QuestionKind, Record
from posterior.data.candidates import Candidates
from posterior.likelihood.directions import passes
from posterior.predictive.mixture import Predictive
from posterior.predictive.sequential import LeftOut
from server.engine import Adapter
from server.engine.scoring import reads
from server.services.options import PredictiveName, Reason, Uncertainty
from server.services.registry import Served


@dataclass(frozen=True)
class Question:
    """What is asked of one posterior: prompts as token ids, and the candidates that may follow them.

    template: hash of the task, where the server itself made the prompts with it and the answers are the task's own, if
    it has any. kind: of a decision.
    """

    served: Served
    predictive: PredictiveName
    prompts: list[list[int]]
    answers: tuple[str, ...]
    candidates: Candidates
    options: Uncertainty
    template: str | None = None
    kind: QuestionKind | None = None

    @property
    def particles(self) -> int:
        """How many adapters score the candidates, at most; one where the predictive is not a mixture."""
        if self.predictive != "mixture":
            return 1
        if self.auto:
            return len(self.served.particles)
        return int(self.options.particles or len(self.served.particles))

    @property
    def auto(self) -> bool:
        """Whether each prompt stops at as many particles as its answer needs."""
        return self.options.particles == "auto"

    @property
    def adapters(self) -> list[Adapter | None]:
        """What scores the candidates, the heaviest particle first."""
        return list(self.served.particles[: self.particles]) if self.predictive == "mixture" else [self.served.map]

    @property
    def weights(self) -> torch.Tensor:
        """Of the adapters."""
        return torch.tensor(self.served.weights[: self.particles] if self.predictive == "mixture" else (1.0,))

    @property
    def chosen_by(self) -> Literal["request", "held-out rows", "default"]:
        """Who has chosen the predictive."""
        if self.options.predictive is not None:
            return "request"
        chosen = self.served.posterior and self.served.posterior.choice
        return "held-out rows" if chosen and chosen.predictive == self.predictive else "default"

    @property
    def evaluations(self) -> int:
        """Passes of the model that it takes, forward or backward."""
        if self.predictive == "linearized":
            return len(self.prompts) + self.backward
        return len(self.prompts) * self.particles * len(reads(self.candidates))

    @property
    def backward(self) -> int:
        """Backward passes among them, at most."""
        return len(self.prompts) * passes(len(self.candidates)) if self.predictive == "linearized" else 0


@dataclass(frozen=True)
class Unprompted:
    """What the model would write if it were not held to the candidates.

    mass: the probability that it begins with one of them, averaged over the particles. likeliest: whether the most
    probable next token begins one, as most of the particles' weight has it.
    """

    mass: float
    likeliest: bool


@dataclass(frozen=True)
class Orders:
    """The orders of the options that an answer is averaged over: how many, and the largest total variation of one's
    probabilities from the average."""

    n: int
    total_variation: float


@dataclass(frozen=True)
class Answer:
    """The predictive of one prompt; `particles` [K, C] are each particle's probabilities, if there are any;
    `unprompted` is None for the linearised predictive, which reads nothing but the candidates; `orders` where there is
    but one; `left_out` where as many particles as needed were asked for; `cached` counts the tokens of its prompts that
    no particle had to compute; `familiarity` where held-out rows tell it."""

    predictive: Predictive
    particles: torch.Tensor | None = None
    unprompted: Unprompted | None = None
    orders: Orders | None = None
    left_out: LeftOut | None = None
    cached: int = 0
    familiarity: float | None = None


@dataclass(frozen=True)
class Judged:
    """An answer's distribution as its client gets it: about the candidate number `best`.

    `probability` [C] are calibrated where there is a `calibration`; variances, intervals, entropies and the Monte-Carlo
    error stay those of the posterior, `answer.predictive`. refusal: why the question is not answered, if it is not.
    requested: whether its label is asked for.
    """

    question: Question
    answer: Answer
    calibration: Record | None
    probability: torch.Tensor
    best: int
    refusal: Reason | None = None
    requested: bool = False

    @property
    def text(self) -> str:
        """The candidate itself."""
        return self.question.answers[self.best]

    @property
    def confidence(self) -> float:
        """Its probability."""
        return float(self.probability[self.best])

    @property
    def prediction_set(self) -> list[int] | None:
        """The numbers of the candidates that hold the right one with the coverage asked for; None without a
        calibration."""
        if self.calibration is None:
            return None
        p, coverage = self.answer.predictive.probability, self.question.options.coverage
        within = self.calibration.prediction_set(p, coverage).tolist()
        return [c for c, inside in enumerate(within) if inside]
