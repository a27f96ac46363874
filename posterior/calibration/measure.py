"""What a calibration is worth, by cross-fitting: what is said of a row comes from a calibration that did not see it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from posterior.calibration.conformal import Conformal, Score, prediction_set
from posterior.calibration.drift import Reference
from posterior.calibration.metrics import Estimate, check, estimate
from posterior.calibration.records import Collected, Key, Record
from posterior.calibration.risk import Risk
from posterior.calibration.scalers import CALIBRATORS, FLOOR, Method
from posterior.errors import PosteriorError

FOLDS = 5


def measure(
    p: Tensor,
    y: Tensor,
    *,
    method: Method,
    score: Score,
    coverage: float,
    key: Key,
    data: str,
    widths: Sequence[int] | None = None,
    missing: Tensor | None = None,
    collected: Collected | None = None,
) -> Record:
    """Fit on all rows, and say by cross-fitting what it is worth. p: [N, C] float64; y: [N]; widths: how many options
    each row has (None: C), with p = 0 behind them.

    missing [M]: the largest probabilities of more rows, whose labels were asked for and never came. What is promised
    counts them as the worst that they can be, and so holds whatever kept the labels away.
    """
    check(p)
    usable(method, set(widths or [p.shape[1]]), p, y)
    after, sets = cross_fit(p, y, method=method, score=score, coverage=coverage, widths=widths)
    return Record(
        key=key,
        calibrator=CALIBRATORS[method].fit(p, y),
        conformal=Conformal.fit(score, p, y, missing=0 if missing is None else len(missing)),
        risk=None if method == "vector" else Risk.fit(p, y, missing),
        n=len(y) + (0 if missing is None else len(missing)),
        data=data,
        before=_defined(estimate(p.clamp(min=FLOOR), y)),
        after=_defined(estimate(after.clamp(min=FLOOR), y)),
        coverage=coverage,
        sets={"covered": _share(sets.gather(1, y[:, None])), "size": mean(sets.sum(1))},
        reference=Reference.of(p.max(1).values.tolist(), torch.special.entr(p).sum(1).tolist()),
        collected=collected,
    )


def usable(method: Method, answers: set[int], p: Tensor, y: Tensor) -> None:
    """Whether a calibrator can be fitted. Raises PosteriorError for one that cannot.

    Args:
        answers: how many of them the rows have.
        p, y: [N, C] and [N].
    """
    if len(answers) > 1 and method == "vector":
        numbers = " or ".join(map(str, sorted(answers)))
        raise PosteriorError(
            f"the questions have {numbers} options, but vector learns a scale and a bias of each; use the method "
            "temperature, platt, isotonic or none"
        )
    if method == "temperature" and bool((p.argmax(1) == y).all()):
        raise PosteriorError(
            f"all {len(y)} answers are right, so that no temperature is low enough; "
            "give more rows, or use the method platt, which allows for mistakes not seen yet"
        )


def cross_fit(
    p: Tensor,
    y: Tensor,
    *,
    method: Method,
    score: Score = "lac",
    coverage: float = 0.9,
    widths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Calibrated probabilities and prediction sets, both [N, C], each row's from the other folds' rows. What is behind
    a row's options (`widths`, as in `measure`) has probability 0 and is in no set."""
    from sklearn.model_selection import KFold

    after, sets = torch.zeros_like(p), torch.zeros(p.shape, dtype=torch.bool)
    for others, fold in KFold(FOLDS, shuffle=True, random_state=0).split(p):
        calibrator = CALIBRATORS[method].fit(p[others], y[others])
        conformal = Conformal.fit(score, p[others], y[others])
        for width, rows in _by_width(fold.tolist(), widths or [p.shape[1]] * len(p)):
            own = p[rows, :width]
            after[rows, :width] = calibrator.apply(own)
            sets[rows, :width] = prediction_set(calibrator, conformal, own, coverage)
    return after, sets


def _by_width(rows: Sequence[int], widths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Each width with those of the rows that have it."""
    for width in {widths[row] for row in rows}:
        yield width, [row for row in rows if widths[row] == width]


def _defined(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Without those that have no value on these rows, like the AUROC where every answer is right."""
    return {name: each for name, each in estimates.items() if not math.isnan(each.value)}


def _share(hits: Tensor) -> Estimate:
    """A share of rows with its exact binomial interval (Clopper & Pearson 1934)."""
    from scipy.stats import binomtest

    found = binomtest(int(hits.sum()), hits.numel())
    low, high = found.proportion_ci()
    return Estimate(float(found.statistic), float(low), float(high))


def mean(values: Tensor) -> Estimate:
    """A mean over rows with its bootstrap interval."""
    from scipy.stats import bootstrap

    found = bootstrap((values.numpy(),), np.mean, n_resamples=1000, method="percentile", rng=0)
    low, high = found.confidence_interval
    return Estimate(float(values.double().mean()), float(low), float(high))
