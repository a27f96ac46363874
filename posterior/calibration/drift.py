"""How far live answers have moved from a calibration's rows, without labels: their confidence, entropy and familiarity.

The statistic is Kolmogorov and Smirnov's D between two histograms of the same bins: the largest difference of the
shares below an edge, which reads as the share of answers that moved. Its p-value is that of two samples; values that
share a bin tie, and ties only make it larger (Noether 1963). So it needs no fewest count in a bin, as chi-squared does,
and is defined where a bin is empty, as the population stability index is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from posterior.calibration.scalers import Part

# Edges of bins (lower, upper]. They lie close where confident answers do.
CONFIDENCE = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
ENTROPY = (0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)  # nats
FAMILIARITY = tuple(round(0.05 * step, 2) for step in range(1, 20))

Counts = Sequence[int]


class Reference(Part):
    """What the rows of a calibration looked like: how many have a confidence, and an entropy, in each bin. Both are the
    predictive's own and not calibrated; of a text, its tokens' mean probability and mean entropy."""

    confidence: tuple[Annotated[int, Field(ge=0)], ...]
    entropy: tuple[Annotated[int, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _bins(self) -> Self:
        if len(self.confidence) != len(CONFIDENCE) + 1 or len(self.entropy) != len(ENTROPY) + 1:
            raise ValueError("the histograms have other bins")
        return self

    @classmethod
    def of(cls, confidence: Iterable[float], entropy: Iterable[float]) -> Self:
        """Of rows, in any order."""
        return cls(confidence=histogram(confidence, CONFIDENCE), entropy=histogram(entropy, ENTROPY))


@dataclass(frozen=True)
class Drift:
    """distance: D, from 0 to 1, between the histograms of n live answers and of `held` rows; p_value: of a distance as
    large where nothing has changed."""

    n: int
    held: int
    distance: float
    p_value: float


def histogram(values: Iterable[float], edges: Sequence[float]) -> tuple[int, ...]:
    """How many values lie in each of the len(edges) + 1 bins."""
    bins = np.searchsorted(edges, np.fromiter(values, float), side="left")
    return tuple(np.bincount(bins, minlength=len(edges) + 1).tolist())


def drift(held: Counts, live: Counts) -> Drift | None:
    """Between two histograms of the same bins; None where one of them is empty."""
    from scipy.stats import ks_2samp

    if not sum(held) or not sum(live):
        return None
    bins = np.arange(len(held))
    found = ks_2samp(np.repeat(bins, held), np.repeat(bins, live), method="asymp")
    return Drift(sum(live), sum(held), float(found.statistic), float(found.pvalue))
