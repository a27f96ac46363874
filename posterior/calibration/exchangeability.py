"""Whether labelled answers are still exchangeable with the rows of a calibration: a conformal test martingale.

What `max_risk` and prediction sets promise holds for questions that are exchangeable with the record's rows. Each
labelled answer, in the order in which the labels came, is ranked among those rows and the labelled answers before it.
Its rank is a conformal p-value: uniform, and independent of those before, as long as all are exchangeable (Vovk,
Gammerman & Shafer 2005, section 7.1). A gambler who starts with a capital of 1 bets against that. The game is fair, so
that the capital ever reaches 1 / a with probability a at most (Ville 1939): however often one looks, LEVEL bounds the
false alarms of a record's whole life.

The bettors of the simple jumper take power bets: they win by small p-values, which are of answers that were worse than
their confidence, and find nothing in better ones, which keep every promise. MAPIE 1.6 has such a test, whose p-values
are these. Its bets are linear in p and find both sides: where 2 % of 60 rows are wrong and 30 % of 200 answers, they
found it in 45 % of simulations, and these in 91 %. It also takes features and an estimator, whose scores it computes,
and here the scores are there already, half of them in a record.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

JUMP = 0.01  # of the capital goes from each bettor to all in equal parts before every bet, so that none is ruined
BETS = (0.5, 0.75, 1.0)  # bet p^(bet - 1), whose mean over uniform p is 1, multiplies a bettor's capital
LEVEL = 0.01  # probability of an alarm, at most, where nothing has changed
TINY = 1e-300
MOST = 10_000  # labelled answers that are looked at, the newest


@dataclass(frozen=True)
class Evidence:
    """Against exchangeability, after n labelled answers: log10 of the capital `now` and of its `largest`."""

    n: int
    now: float
    largest: float

    @property
    def rejected(self) -> bool:
        """Whether the capital has once reached 1 / LEVEL."""
        return self.largest >= -math.log10(LEVEL)


def evidence(held: Sequence[float], live: Sequence[float]) -> Evidence | None:
    """Of the `scores` of a record's rows and of labelled answers, in their order; None without any."""
    if not len(live) or not len(held):
        return None
    capital = log_capital(p_values(held, live))
    return Evidence(len(capital), float(capital[-1]), max(0.0, float(capital.max())))


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
    for t, value in enumerate(p.clip(min=TINY).tolist()):
        won = [
            ((1 - JUMP) * part + JUMP / count) * bet * value ** (bet - 1)
            for part, bet in zip(share, BETS, strict=True)
        ]  # fmt: skip
        total = sum(won)
        share = [part / total for part in won]
        logarithm += math.log10(total)
        found[t] = logarithm
    return found
