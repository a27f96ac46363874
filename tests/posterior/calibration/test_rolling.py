"""The figures of outcomes against scikit-learn, torchmetrics, formulas by hand, and their intervals by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from posterior.calibration.metrics import right_ece
from posterior.calibration.rolling import Labelled, figures, mean, promised, reliability, share

CONFIDENCE = 0.5 + 0.5 * np.random.default_rng(0).beta(3, 1, 300)
RIGHT = np.random.default_rng(1).random(300) < CONFIDENCE - 0.1


def test_the_figures_of_confidence_are_scikit_learn_s_and_torchmetrics() -> None:
    from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
    from torchmetrics.functional.classification import binary_calibration_error

    found = figures([Labelled(bool(r), float(c)) for c, r in zip(CONFIDENCE, RIGHT, strict=True)])
    expected = {
        "accuracy": accuracy_score(RIGHT, np.ones(300)),
        "nll": log_loss(RIGHT, CONFIDENCE),
        "brier": brier_score_loss(RIGHT, CONFIDENCE),
        "ece": float(binary_calibration_error(torch.tensor(CONFIDENCE), torch.tensor(RIGHT).int(), n_bins=15)),
        "gap": CONFIDENCE.mean() - RIGHT.mean(),
    }
    assert {name: each.value for name, each in found.items()} == pytest.approx(expected, abs=1e-6)
    assert all(each.low < each.value < each.high for each in found.values())


def test_the_diagram_is_numpys_and_its_gaps_are_the_ece() -> None:
    rows = [Labelled(bool(r), float(c)) for c, r in zip(CONFIDENCE, RIGHT, strict=True)]
    found = reliability([*rows, Labelled(True), Labelled(False)])
    counts, bounds = np.histogram(CONFIDENCE, bins=10, range=(0, 1))
    inside = np.digitize(CONFIDENCE, bounds[1:-1], right=True)
    for bin in found:
        index = round(10 * bin.upper) - 1
        assert bin.n == counts[index] and bin.confidence == pytest.approx(CONFIDENCE[inside == index].mean())
        assert bin.accuracy == pytest.approx(RIGHT[inside == index].mean())
    ece = sum(bin.n * abs(bin.confidence - bin.accuracy) for bin in found) / 300
    assert ece == pytest.approx(right_ece(torch.tensor(CONFIDENCE), torch.tensor(RIGHT), bins=10))
    assert [bin.upper for bin in reliability([Labelled(True, 0.0), Labelled(True, 0.1), Labelled(True, 1.0)])] == [
        0.1,
        1,
    ]


def test_a_share_has_wilson_s_interval() -> None:
    z, n, k = 1.959964, 40, 3
    p = k / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = share([True] * k + [False] * (n - k))
    expected = (p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
    assert (found.value, found.low, found.high) == pytest.approx(expected, rel=1e-5)
    assert share([True]).high == 1.0


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says() -> None:
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(1000):
        found = mean(torch.rand(100, generator=generator, dtype=torch.float64).square())
        inside += found.low <= 1 / 3 <= found.high
    assert 930 <= inside <= 970


def test_sets_and_risk_are_of_the_answers_that_have_them() -> None:
    rows = [
        Labelled(True, covered=True, coverage=0.9, max_risk=0.1),
        Labelled(False, covered=False, coverage=0.8, max_risk=0.05),
        Labelled(False),
        Labelled(True, max_risk=0.3),
    ]
    found = figures(rows)
    assert {name: each.value for name, each in found.items()} == {
        "accuracy": 0.5, "coverage": 0.5, "risk": pytest.approx(1 / 3)
    }  # fmt: skip
    assert promised(rows) == pytest.approx({"coverage": 0.85, "max_risk": 0.15})


def test_few_rows_say_little() -> None:
    assert figures([]) == {} and promised([]) == {}
    assert set(figures([Labelled(True, 0.9)])) == {"accuracy"}


def test_a_certainty_that_was_wrong_has_a_finite_loss() -> None:
    assert math.isfinite(figures([Labelled(False, 1.0), Labelled(True, 1.0)])["nll"].value)
