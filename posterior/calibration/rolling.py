"""What outcomes say of the answers they are about, each figure with its 95 % interval.

Shares have Wilson's interval (1927), which keeps its level for few rows and for shares near 0 and 1 (Brown, Cai &
DasGupta 2001). Means have that of the central limit theorem, and the ECE, which is no mean, a percentile bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posterior.calibration.metrics import Estimate, estimate, reliability_bins, right_ece
from posterior.calibration.scalers import FLOOR

WIDTH = 1.959964  # standard errors on either side
DRAWS = 200  # resamples of the bootstrap
BINS = 10  # of the reliability diagram

PROMISED = {"coverage": "coverage", "risk": "max_risk"}  # figures, and the means of what was asked for


class Labelled(NamedTuple):
    """An answer of which it is known whether it was right. confidence: what its client was told, if anything; covered:
    whether its prediction set of this `coverage` held what was true, None without one; max_risk: the error that was
    allowed, None where the question was refused or any error was allowed."""

    right: bool
    confidence: float | None = None
    covered: bool | None = None
    coverage: float | None = None
    max_risk: float | None = None


def figures(rows: Sequence[Labelled]) -> dict[str, Estimate]:
    """What the rows tell of accuracy; of the confidence that an answer is right: nll (nats), brier, ece, and gap, its
    mean less the accuracy; coverage, the share of prediction sets that held what was true; and risk, the share of wrong
    answers among those that `max_risk` let pass."""
    found: dict[str, Estimate] = {}
    if rows:
        found["accuracy"] = share([row.right for row in rows])
    sure = [(row.confidence, row.right) for row in rows if row.confidence is not None]
    if len(sure) > 1:
        confidence = torch.tensor([each for each, _ in sure], dtype=torch.float64).clamp(FLOOR, 1 - FLOOR)
        right = torch.tensor([good for _, good in sure])
        found["nll"] = mean(-torch.where(right, confidence, 1 - confidence).log())
        found["brier"] = mean((confidence - right.double()).square())
        found |= estimate(confidence, right, draws=DRAWS, metrics={"ece": right_ece})
        found["gap"] = mean(confidence - right.double())
    if covered := [row.covered for row in rows if row.covered is not None]:
        found["coverage"] = share(covered)
    if answered := [not row.right for row in rows if row.max_risk is not None]:
        found["risk"] = share(answered)
    return found


class Bin(NamedTuple):
    """n answers whose confidence is above the bin before and at most `upper`: their mean confidence, and the share of
    right ones."""

    upper: float
    n: int
    confidence: float
    accuracy: float


def reliability(rows: Sequence[Labelled]) -> list[Bin]:
    """The reliability diagram of the confidences: BINS bins of equal width, without those that are empty."""
    sure = [(row.confidence, row.right) for row in rows if row.confidence is not None]
    confidence = torch.tensor([each for each, _ in sure], dtype=torch.float64)
    columns = reliability_bins(confidence, torch.tensor([right for _, right in sure]), BINS)
    each = zip(*(column.tolist() for column in columns), strict=True)
    return [Bin((index + 1) / BINS, int(n), *rest) for index, (n, *rest) in enumerate(each) if n]


def promised(rows: Sequence[Labelled]) -> dict[str, float]:
    """The mean coverage that was asked for of the prediction sets, and the mean `max_risk` of what was answered."""
    found = {
        "coverage": [row.coverage for row in rows if row.covered is not None and row.coverage is not None],
        "max_risk": [row.max_risk for row in rows if row.max_risk is not None],
    }
    return {name: math.fsum(values) / len(values) for name, values in found.items() if values}


def share(hits: Sequence[bool]) -> Estimate:
    """A share with Wilson's interval."""
    from scipy.stats import binomtest

    found = binomtest(sum(hits), len(hits))
    low, high = found.proportion_ci(method="wilson")
    return Estimate(sum(hits) / len(hits), float(low), float(high))


def mean(values: Tensor) -> Estimate:
    """The mean of at least two values, with the interval of the central limit theorem."""
    middle, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
    return Estimate(middle, middle - WIDTH * error, middle + WIDTH * error)
