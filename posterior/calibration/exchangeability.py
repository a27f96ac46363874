"""Whether labelled answers are still exchangeable with the rows of a calibration: a conformal test martingale.

What `max_risk` and prediction sets promise holds for questions that are exchangeable with the record's rows. Each
labelled answer, in the order in which the labels came, is ranked among those rows and the labelled answers before it.
Its rank is a conformal p-value: uniform, and independent of those before, as long as all are exchangeable (Vovk,
Gammerman & Shafer 2005, section 7.1). A gambler who starts with a capital of 1 bets against that. The game is fair, so
that the capital ever reaches 1 / a with probability a at most (Ville 1939): however often one looks, LEVEL bounds the
false alarms of a record's whole life.

The bets are those of the simple jumper, which are MAPIE 1.6's too (a test compares both). MAPIE's class is not used: it
takes features and an estimator, whose scores it computes, and here the scores are there already, half of them in a
record.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

JUMP = 0.01  # of the capital goes from each bettor to all in equal parts before every bet, so that none is ruined
BETS = (-1.0, 0.0, 1.0)  # 1 + bet (p - 1/2) is what a bettor's capital is multiplied by
LEVEL = 0.01  # probability of an alarm, at most, where nothing has changed
MOST = 10_000  # labelled answers that are looked at, the newest


@dataclass(frozen=True)
class Evidence:
    """Against exchangeability, after n labelled answers: log10 of the capital `now` and of its `largest`; mean_p: below
    1/2 where answers are worse than the record's rows, above where they are better."""

    n: int
    now: float
    largest: float
    mean_p: float

    @property
    def rejected(self) -> bool:
        """Whether the capital has once reached 1 / LEVEL."""
        return self.largest >= -math.log10(LEVEL)


def evidence(held: Sequence[float], live: Sequence[float]) -> Evidence | None:
    """Of the `scores` of a record's rows and of labelled answers, in their order; None without any."""
    if not len(live) or not len(held):
        return None
    p = p_values(held, live)
    capital = log_capital(p)
    return Evidence(len(p), float(capital[-1]), max(0.0, float(capital.max())), float(p.mean()))


def scores(confidence: Sequence[float], right: Sequence[bool]) -> list[float]:
    """One less the probability that an answer's confidence gave to what came true: that it was right, or wrong."""
    return [1 - c if good else c for c, good in zip(confidence, right, strict=True)]


def p_values(held: Sequence[float], live: Sequence[float], seed: int = 0) -> NDArray[np.float64]:
    """The smoothed conformal p-value of each of the `live` scores among `held` and those before it: small for a large
    score. Always with the same random numbers, which do not depend on the scores."""
    uniform = np.random.default_rng(seed).random(len(live))
    known, found = sorted(held), np.empty(len(live))
    for t, score in enumerate(live):
        right = bisect_right(known, score)
        equal = right - bisect_left(known, score)
        found[t] = (len(known) - right + uniform[t] * (equal + 1)) / (len(known) + 1)
        insort(known, score)
    return found


def log_capital(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """log10 of the capital after each p-value: the simple jumper's."""
    count = len(BETS)
    share = [1 / count] * count  # of the capital, a bettor each
    logarithm, found = 0.0, np.empty(len(p))
    for t, value in enumerate(p.tolist()):
        won = [
            ((1 - JUMP) * part + JUMP / count) * (1 + bet * (value - 0.5))
            for part, bet in zip(share, BETS, strict=True)
        ]  # fmt: skip
        total = sum(won)
        share = [part / total for part in won]
        logarithm += math.log10(total)
        found[t] = logarithm
    return found
