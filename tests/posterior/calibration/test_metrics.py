"""Metrics against torchmetrics, scikit-learn, brute force and by hand."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from posterior.calibration import metrics
from posterior.calibration.conformal import sets
from posterior.errors import PosteriorError


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(500, 4, generator=generator, dtype=torch.float64).pow(3)
    return p / p.sum(1, keepdim=True), torch.randint(4, (500,), generator=generator)


@pytest.fixture
def tied(data):
    """The same with confidences that many rows share: of one decimal."""
    p, y = data
    top = (p.max(1, keepdim=True).values * 10).round() / 10
    rest = ((1 - top) / 3).expand(-1, 4)
    return rest.scatter(1, p.argmax(1, keepdim=True), top + 1e-9), y


def test_ece_is_torchmetrics(data):
    p, y = data
    expected = float(multiclass_calibration_error(p, y, num_classes=4, n_bins=15, norm="l1"))
    assert metrics.ece(p, y) == pytest.approx(expected, abs=1e-6)


def test_reliability_bins_are_those_of_a_loop(data):
    p, y = data
    confidence, right = p.max(1).values, p.argmax(1) == y
    for index, (count, mean, share) in enumerate(zip(*metrics.reliability(p, y, 10), strict=True)):
        inside = (confidence > index / 10) & (confidence <= (index + 1) / 10)
        assert count == inside.sum()
        torch.testing.assert_close(mean, confidence[inside].mean(), equal_nan=True)
        torch.testing.assert_close(share, right[inside].double().mean(), equal_nan=True)


def test_adaptive_ece_is_that_of_a_loop(data):
    p, y = data
    confidence, right = p.max(1).values.numpy(), (p.argmax(1) == y).numpy()
    edges = [math.ceil(500 * index / 15) for index in range(16)]
    parts = [np.argsort(-confidence)[low:high] for low, high in pairwise(edges)]
    assert {len(part) for part in parts} == {33, 34}
    expected = sum(len(part) / 500 * abs(confidence[part].mean() - right[part].mean()) for part in parts)
    assert metrics.adaptive_ece(p, y) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rows", ["data", "tied"])
def test_auroc_is_sklearn(rows, request):
    p, y = request.getfixturevalue(rows)
    expected = roc_auc_score(p.argmax(1) == y, p.max(1).values)
    assert metrics.auroc(p, y) == pytest.approx(expected, abs=1e-12)


def test_ood_auroc_is_sklearn():
    scores = torch.randn(500, generator=torch.Generator().manual_seed(2), dtype=torch.float64).round(decimals=1)
    inside, outside = scores[:300], scores[300:] + 1
    expected = roc_auc_score([0] * 300 + [1] * 200, torch.cat([inside, outside]))
    assert metrics.ood_auroc(inside, outside) == pytest.approx(expected, abs=1e-12)
    assert metrics.ood_auroc(inside, inside) == pytest.approx(0.5, abs=1e-12)


def test_aurc_is_that_of_a_loop(data):
    p, y = data
    confidence, wrong = p.max(1).values, (p.argmax(1) != y).double()
    risks = [float(wrong[confidence >= threshold].mean()) for threshold in confidence]
    assert metrics.aurc(p, y) == pytest.approx(sum(risks) / 500, abs=1e-12)
    risk = metrics.risk_coverage(p, y)
    assert float(risk[-1]) == pytest.approx(1 - metrics.accuracy(p, y)) and risk.shape == (500,)


def test_aurc_of_ties_is_the_mean_over_their_orders():
    p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]], dtype=torch.float64)
    y = torch.tensor([0, 1, 0, 1, 0])
    wrong = [0.0, 1.0, 0.0, 0.0, 1.0]
    orders = [(*first, *last) for first in permutations(range(3)) for last in permutations((3, 4))]
    areas = [np.mean(np.cumsum([wrong[row] for row in order]) / np.arange(1, 6)) for order in orders]
    assert metrics.aurc(p, y) == pytest.approx(np.mean(areas), abs=1e-12)


def test_the_order_of_rows_does_not_matter(tied):
    p, y = tied
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    for name, metric in metrics.METRICS.items():
        assert metric(p[shuffled], y[shuffled]) == pytest.approx(metric(p, y), abs=1e-12), name


def test_by_hand():
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    y = torch.tensor([0, 0])
    assert metrics.accuracy(p, y) == 0.5
    assert metrics.nll(p, y) == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert metrics.brier(p, y) == pytest.approx((0.04 + 0.04 + 0.36 + 0.36) / 2)
    assert metrics.signed_gap(p, y) == pytest.approx(0.7 - 0.5)
    assert metrics.ece(p, y) == metrics.adaptive_ece(p, y) == pytest.approx((0.2 + 0.6) / 2)
    assert metrics.auroc(p, y) == 1.0
    assert metrics.aurc(p, y) == pytest.approx((0 + 1 / 2) / 2)


def test_a_certain_mistake_has_infinite_nll():
    assert metrics.nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == math.inf


def test_bootstrap_interval_covers_and_is_reproducible(data):
    first, second = metrics.estimate(*data, draws=200), metrics.estimate(*data, draws=200)
    assert first == second
    for value in first.values():
        assert value.low <= value.high
    width = first["accuracy"].high - first["accuracy"].low
    q = first["accuracy"].value
    assert width == pytest.approx(2 * 1.96 * math.sqrt(q * (1 - q) / 500), rel=0.25)  # the binomial's normal interval


def test_intervals_survive_resamples_without_a_value():
    """One mistake of 40: 36 % of the resamples have none, and no AUROC."""
    p = torch.linspace(0.6, 0.99, 40, dtype=torch.float64)
    p = torch.stack([p, 1 - p], 1)
    y = torch.zeros(40, dtype=torch.long)
    y[10] = 1
    found = metrics.estimate(p, y, draws=200)["auroc"]
    assert found.value == pytest.approx(29 / 39) and 0.5 < found.low < found.value < found.high < 1


def test_intervals_where_nothing_or_infinity_is_the_value():
    p, y = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64), torch.tensor([0, 1])
    found = metrics.estimate(p, y, draws=20)
    assert str(found["auroc"]) == "-" and math.isnan(found["auroc"].low)
    assert found["aurc"] == metrics.Estimate(0.0, 0.0, 0.0)
    certain = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64).repeat(20, 1)
    found = metrics.estimate(certain, torch.ones(40, dtype=torch.long), draws=20)
    assert str(found["nll"]) == "inf [inf, inf]"


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_are_those_of_a_loop(data, score):
    p, y = data
    given = p.argmax(1)

    def scored(row: torch.Tensor, answer: int) -> float:
        return float(1 - row[answer] if score == "lac" else row[row > row[answer]].sum())

    scores = sorted(scored(row, int(label)) for row, label in zip(p[:99], y[:99], strict=True))
    threshold = scores[math.ceil(100 * 0.8) - 1] + 1e-12
    chosen = [
        [scored(row, answer) <= threshold or answer == given[99 + index] for answer in range(4)]
        for index, row in enumerate(p[99:])
    ]
    covered = np.mean([row[label] for row, label in zip(chosen, y[99:], strict=True)])
    found = sets(p[:99], y[:99], p[99:], y[99:], 0.8, score)
    assert found == pytest.approx((covered, np.sum(chosen) / 401), abs=1e-12)


def test_sets_of_too_few_calibration_rows_hold_every_answer(data):
    p, y = data
    assert sets(p[:8], y[:8], p[8:], y[8:]) == (1.0, 4.0)


def test_probabilities_that_are_not_finite_are_refused():
    with pytest.raises(PosteriorError, match="not finite; try float32"):
        metrics.check(torch.tensor([[math.nan, 1.0]]))


def test_best_temperature_recovers_a_known_one():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(20_000, 3, generator=generator, dtype=torch.float64) * 2
    y = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
    assert metrics.best_temperature(scores * 3, y) == pytest.approx(3.0, rel=0.05)


def test_the_ece_of_exact_probabilities_is_what_chance_leaves():
    """All rows in one bin: the mean absolute error of a share, sqrt(2/pi) of its standard deviation, within 10 %."""
    p = torch.tensor([[0.8, 0.2]], dtype=torch.float64).repeat(400, 1)
    expected = math.sqrt(2 / math.pi * 0.8 * 0.2 / 400)
    assert metrics.calibrated_ece(p) == pytest.approx(expected, rel=0.1) == metrics.calibrated_ece(p)
    assert metrics.calibrated_ece(p[:50]) > 2 * expected
    assert metrics.calibrated_ece(torch.tensor([[1.0, 0.0]]).repeat(9, 1)) == 0
