"""Prediction sets against simulation, MAPIE and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from posterior.calibration import conformal, scalers
from posterior.calibration.conformal import MIN_ROWS, Conformal
from tests.posterior.calibration.made import draw, make


@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize(("n", "coverage"), [(59, 0.9), (100, 0.8), (200, 0.95)])
def test_coverage_over_calibration_sets(score: conformal.Score, n: int, coverage: float) -> None:
    """Over seeds, the true answer is covered with probability k / (n + 1), k = ceil((n + 1) coverage), or above by
    ties, within five standard errors (the coverage of one calibration set is Beta(k, n + 1 - k))."""
    seeds, fresh = 400, 200
    k = math.ceil((n + 1) * coverage - 1e-9)
    hits = []
    for seed in range(seeds):
        p, y = draw(n + fresh, seed=seed)
        sets = Conformal.fit(score, p[:n], y[:n]).sets(p[n:], coverage)
        hits.append(float(sets.gather(1, y[n:, None]).double().mean()))
    expected, beta = k / (n + 1), k * (n + 1 - k) / ((n + 1) ** 2 * (n + 2))
    error = math.sqrt((beta + expected * (1 - expected) / fresh) / seeds)
    assert abs(np.mean(hits) - expected) < 5 * error


def test_lac_is_mapie() -> None:
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
        """A classifier whose inputs are its probabilities."""

        classes_ = np.arange(3)
        fitted_ = True

        def fit(self, x: Any, y: Any) -> Given:
            return self

        def predict_proba(self, x: Any) -> Any:
            return x

        def predict(self, x: Any) -> Any:
            return x.argmax(1)

    p, y = draw(300)
    theirs = SplitConformalClassifier(Given(), confidence_level=[0.7, 0.9], conformity_score="lac", prefit=True)
    theirs.conformalize(p[:99].numpy(), y[:99].numpy())
    _, expected = theirs.predict_set(p[99:].numpy())
    ours = Conformal.fit("lac", p[:99], y[:99])
    for index, coverage in enumerate((0.7, 0.9)):
        assert (ours.sets(p[99:], coverage).numpy() == expected[:, :, index]).all()


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_grow_with_coverage_and_end_with_every_answer(score: conformal.Score) -> None:
    record = make(score=score)
    p, _ = draw(200, seed=1)
    last = torch.zeros_like(p, dtype=torch.bool)
    for coverage in (0.01, 0.3, 0.6, 0.8, 0.9, 0.95, 80 / 81, 0.999):
        sets = record.prediction_set(p, coverage)
        assert bool((sets | ~last).all()), "nested"
        assert bool(sets.any(1).all()), "never empty"
        last = sets
    assert bool(last.all()), "80 rows promise no more than 80/81"


def test_aps_adds_answers_by_probability() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.05, 0.85]], dtype=torch.float64)
    conformal = Conformal(score="aps", scores=(0.0, 0.6, 0.9))
    assert conformal.sets(p, 0.5).tolist() == [[True, True, False], [False, False, True]]
    assert conformal.sets(p, 0.25).tolist() == [[True, False, False], [False, False, True]]


def test_the_quantile_is_the_finite_sample_one() -> None:
    conformal = Conformal(score="lac", scores=tuple(i / 100 for i in range(1, 60)))
    assert conformal.threshold(0.9) == 0.54, "ceil(60 * 0.9) = 54"
    assert conformal.threshold(59 / 60) == 0.59
    assert conformal.threshold(0.99) == math.inf
    assert 0.95**MIN_ROWS <= 0.05 < 0.95 ** (MIN_ROWS - 1)


def test_a_long_calibration_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalers, "MAX_NUMBERS", 512)
    p, y = draw(6000)
    conformal = Conformal.fit("lac", p, y)
    assert len(conformal.scores) == scalers.MAX_NUMBERS
    assert conformal.threshold(0.9) == pytest.approx(float((1 - p.gather(1, y[:, None])).quantile(0.9)), abs=0.03)
    record = make(600, method="isotonic")
    assert (record.n, len(record.conformal.scores)) == (600, scalers.MAX_NUMBERS)
