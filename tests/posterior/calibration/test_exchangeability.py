"""The test martingale against MAPIE, by hand, and in simulations of nothing and of something to find."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from posterior.calibration.exchangeability import BETS, JUMP, LEVEL, Evidence, evidence, log_capital, p_values, scores


def rows(n: int, wrong: float, generator: np.random.Generator) -> list[float]:
    """The scores of n answers with confidences like those of a classifier, of which this share is wrong."""
    confidence = 0.5 + 0.5 * generator.beta(5, 1, n)
    return scores(confidence.tolist(), (generator.random(n) >= wrong).tolist())


def test_scores_are_what_the_confidence_gave_to_the_contrary() -> None:
    assert scores([0.9, 0.9, 0.5], [True, False, True]) == pytest.approx([0.1, 0.9, 0.5])


def test_p_values_are_mapie_s() -> None:
    from mapie.exchangeability_testing import OnlineMartingaleTest

    generator = np.random.default_rng(0)
    held, live = rows(40, 0.2, generator), rows(60, 0.2, generator)
    live[10:15] = live[:5]  # ties
    theirs = OnlineMartingaleTest(task="classification", warn=False)
    draws = np.random.default_rng(0).random(len(live)).tolist()
    drawn: Any = iter(draws)
    theirs.rng = type("Drawn", (), {"uniform": lambda self: next(drawn)})()
    expected = [theirs.compute_p_value(score, np.array(held + live[:t])) for t, score in enumerate(live)]
    assert p_values(held, live).tolist() == pytest.approx(expected)


def test_the_capital_is_the_mean_of_all_ways_to_bet() -> None:
    """A way to bet is a bettor for each p-value, who stays with probability 1 - JUMP and is drawn anew else."""
    p = [0.03, 0.5, 0.2, 0.01, 0.9]
    expected = 0.0
    for way in product(range(len(BETS)), repeat=len(p)):
        probability = 1 / len(BETS)
        for before, after in pairwise(way):
            probability *= JUMP / len(BETS) + (1 - JUMP) * (before == after)
        expected += probability * math.prod(
            BETS[bettor] * x ** (BETS[bettor] - 1) for bettor, x in zip(way, p, strict=True)
        )
    assert log_capital(np.array(p))[-1] == pytest.approx(math.log10(expected))


def test_every_bet_is_fair() -> None:
    p = (np.arange(10**6) + 0.5) / 10**6
    assert [float((bet * p ** (bet - 1)).mean()) for bet in BETS] == pytest.approx([1.0] * len(BETS), abs=1e-3)


def test_the_capital_does_not_overflow() -> None:
    assert math.isfinite(log_capital(np.full(5000, 0.0))[-1]) and log_capital(np.full(5000, 0.001))[-1] > 400


def test_p_values_are_uniform_and_independent_where_nothing_has_changed() -> None:
    generator = np.random.default_rng(2)
    p = np.array([p_values(rows(30, 0.3, generator), rows(2, 0.3, generator), seed) for seed in range(2000)])
    from scipy.stats import kstest, spearmanr

    assert all(kstest(p[:, t], "uniform").pvalue > 0.01 for t in range(2))
    assert abs(spearmanr(p[:, 0], p[:, 1]).statistic) < 4 / math.sqrt(len(p))


def simulated(runs: int, wrong: tuple[float, float], seed: int, n: int = 400) -> list[Evidence]:
    """Of 60 rows of which the first share is wrong, and n answers of which the second is."""
    generator = np.random.default_rng(seed)
    found = [evidence(rows(60, wrong[0], generator), rows(n, wrong[1], generator)) for _ in range(runs)]
    return [each for each in found if each is not None]


def test_false_alarms_are_as_rare_as_promised() -> None:
    found = simulated(200, (0.1, 0.1), seed=3)
    for level in (0.2, 0.05, LEVEL):
        alarms = sum(each.largest >= -math.log10(level) for each in found)
        assert alarms <= 200 * level + 3 * math.sqrt(200 * level * (1 - level)), level


def test_answers_that_are_wrong_more_often_are_found() -> None:
    assert sum(each.rejected for each in simulated(50, (0.02, 0.3), seed=4, n=200)) >= 40


def test_answers_that_are_right_more_often_are_no_alarm() -> None:
    assert not any(each.rejected for each in simulated(20, (0.3, 0.02), seed=5))


def test_nothing_is_known_without_rows_or_answers() -> None:
    assert evidence([], [0.1]) is None and evidence([0.1], []) is None
