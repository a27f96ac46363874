"""Split-conformal prediction sets (Vovk et al. 2005; Lei et al. 2018): sets of answers that hold the true one.

Scores are of the predictive's probabilities p themselves and not of the calibrated ones: p saw none of the calibration
rows, so that all of them may serve both, and the guarantee is exact.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from posterior.calibration import scalers
from posterior.calibration.metrics import COVERAGE
from posterior.calibration.scalers import MAX_NUMBERS, Calibrator, Part, Share, Temperature, ascending

# The fewest rows whose largest score bounds 95 % of all cases with 95 % confidence: the coverage of a conformal set at
# the largest of n scores is Beta(n, 1) distributed over calibration sets (Vovk 2012), and 0.95^n <= 0.05 from here on.
MIN_ROWS = 59
Score = Literal["lac", "aps"]


class Conformal(Part):
    """Split-conformal prediction sets from the sorted scores of the true answers: any coverage can be asked for.

    lac: score 1 - p_y (Sadinle, Lei & Wasserman 2019), the smallest sets on average.
    aps: score = mass of the answers more probable than y (Romano, Sesia & Candès 2020, with U = 0 instead of a random
    one, so that the same request gets the same set): answers by probability until their mass passes the threshold.
    """

    score: Score
    scores: Annotated[tuple[Share, ...], Field(min_length=1, max_length=MAX_NUMBERS)]

    @model_validator(mode="after")
    def _sorted(self) -> Self:
        if not ascending(self.scores):
            raise ValueError("the scores are not in ascending order")
        return self

    @classmethod
    def fit(cls, score: Score, p: Tensor, y: Tensor, seed: int = 0, missing: int = 0) -> Self:
        """Of more than MAX_NUMBERS rows a random part is kept: the guarantee is that part's own. Of `missing` more rows
        the label never came: each counts as one whose true answer has the largest score."""
        scores = torch.cat([_scores(score, p).gather(1, y[:, None])[:, 0], p.new_ones(missing)])
        keep = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))[: scalers.MAX_NUMBERS]
        return cls(score=score, scores=tuple(scores[keep].clamp(0, 1).sort().values.tolist()))

    def threshold(self, coverage: float) -> float:
        """The ceil((n + 1) coverage)-th smallest of n scores; inf, every answer, where n rows cannot promise more."""
        rank = math.ceil((len(self.scores) + 1) * coverage - 1e-9)
        return self.scores[max(rank, 1) - 1] if rank <= len(self.scores) else math.inf

    def sets(self, p: Tensor, coverage: float) -> Tensor:
        """Which answers [..., C] are in the set: the true one with probability >= coverage over rows and calibration
        sets, as long as rows are exchangeable with the calibration's."""
        return _scores(self.score, p).clamp(0, 1) <= self.threshold(coverage)


def prediction_set(calibrator: Calibrator, conformal: Conformal, p: Tensor, coverage: float) -> Tensor:
    """The conformal set [..., C] and the answer given, the calibrated most probable one: no set is empty."""
    given = calibrator.apply(p).argmax(-1, keepdim=True)
    return conformal.sets(p, coverage).scatter(-1, given, True)


# Records on disk


def sets(
    calibration_p: Tensor, calibration_y: Tensor, p: Tensor, y: Tensor, coverage: float = COVERAGE, score: Score = "lac"
) -> tuple[float, float]:
    """Share of the prediction sets that hold the true label, and their mean size: split-conformal at `coverage`, with
    the most probable answer always in, as they are served."""
    conformal = Conformal.fit(score, calibration_p, calibration_y)
    chosen = prediction_set(Temperature(temperature=1.0), conformal, p, coverage).double()
    return float(chosen.gather(1, y[:, None]).mean()), float(chosen.sum(1).mean())


def _scores(score: Score, p: Tensor) -> Tensor:
    """The conformal score [..., C] of every answer."""
    if score == "lac":
        return 1 - p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(p).scatter(-1, order, ordered.cumsum(-1) - ordered)
