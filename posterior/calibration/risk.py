"""Act or hand over: the confidence from which on answers are wrong at most as often as somebody allows.

Held-out rows tell it, by Learn-then-Test (Angelopoulos et al. 2021) with exact binomial tests, as in selective
classification with guaranteed risk (Geifman & El-Yaniv 2017). With probability 1 - DELTA over the held-out rows, the
share of wrong answers among the questions that are answered is at most the one allowed, as long as questions are
exchangeable with those rows.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.stats import binom
from torch import Tensor

from posterior.calibration import scalers
from posterior.calibration.scalers import MAX_NUMBERS, Part, Share

DELTA = 0.1  # probability over the held-out rows that the bound does not hold
STARTS = 8  # of the sequences of tests; each has its part of DELTA


class Risk(Part):
    """Held-out rows by the confidence of their most probable answer, and which of these answers are right.

    Confidences are the predictive's own and not calibrated, as for prediction sets: no row has chosen them.
    """

    confidence: Annotated[tuple[Share, ...], Field(min_length=1, max_length=MAX_NUMBERS)]
    right: tuple[bool, ...]

    @model_validator(mode="after")
    def _sorted(self) -> Self:
        if len(self.right) != len(self.confidence):
            raise ValueError("confidence and right have different lengths")
        if any(low > high for high, low in zip(self.confidence, self.confidence[1:], strict=False)):
            raise ValueError("the confidences are not in descending order")
        return self

    @classmethod
    def fit(cls, p: Tensor, y: Tensor, missing: Tensor | None = None) -> Self:
        """Of probabilities [N, C] and labels [N]; missing: as in `of`."""
        confidence, answer = p.max(1)
        return cls.of(confidence, answer == y, missing=missing)

    @classmethod
    def of(cls, confidence: Tensor, right: Tensor, seed: int = 0, missing: Tensor | None = None) -> Self:
        """Of confidences [N] in answers that are right or not [N]; of more than MAX_NUMBERS rows a random part is
        kept. missing: confidences [M] in answers whose label never came, which count as wrong."""
        if missing is not None:
            confidence, right = (
                torch.cat([confidence, missing]),
                torch.cat([right, missing.new_zeros(len(missing)) > 0]),
            )
        keep = torch.randperm(len(right), generator=torch.Generator().manual_seed(seed))[: scalers.MAX_NUMBERS]
        order = keep[confidence[keep].argsort(descending=True, stable=True)]
        return cls(confidence=tuple(confidence[order].clamp(0, 1).tolist()), right=tuple(right[order].tolist()))

    def threshold(self, allowed: float) -> float | None:
        """The least confidence at which a question is answered, for an error of at most `allowed` among those that are;
        None where these rows prove no such thing.

        Rows are added one after the other, the most confident first, and each time the hypothesis that the error is
        larger is tested. A sequence of tests ends with the first that does not reject, which keeps its level however
        long it is; STARTS of them begin at different numbers of rows.
        """
        ends = np.flatnonzero(
            np.append(np.diff(self.confidence) != 0, True)
        )  # equal confidences stand or fall together
        counts = ends + 1
        wrong = np.cumsum(~np.array(self.right))[ends]
        passed = np.asarray(binom.cdf(wrong, counts, allowed)) <= DELTA / STARTS
        first = int(np.searchsorted(counts, needed(allowed)))
        best = -1
        for start in np.linspace(first, len(counts), STARTS, endpoint=False).astype(int):
            failed = np.flatnonzero(~passed[start:])
            length = failed[0] if len(failed) else len(passed) - start
            best = max(best, start + length - 1 if length else -1)
        return None if best < 0 else self.confidence[ends[best]]


class Held(NamedTuple):
    """What an allowed error comes to. threshold: the least confidence that is answered, None where the held-out rows
    prove none; answered: the share of test rows that have it; wrong: the share of those that are answered wrongly."""

    allowed: float
    threshold: float | None
    answered: float
    wrong: float

    @classmethod
    def of(cls, risk: Risk, allowed: float, p: Tensor, y: Tensor) -> Held:
        """On test rows, probabilities [N, C] and labels [N]."""
        threshold = risk.threshold(allowed)
        confidence, answer = p.max(1)
        kept = confidence >= (math.inf if threshold is None else threshold)
        wrong = float((answer != y)[kept].double().mean()) if bool(kept.any()) else math.nan
        return cls(allowed, threshold, float(kept.double().mean()), wrong)


def needed(allowed: float) -> int:
    """The fewest rows, all answered right, that prove an error of at most `allowed`."""
    return math.ceil(math.log(DELTA / STARTS) / math.log1p(-allowed))
