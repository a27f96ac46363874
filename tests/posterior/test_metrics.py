"""Metrics against torchmetrics and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from posterior import metrics


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(500, 4, generator=generator, dtype=torch.float64).pow(3)
    return p / p.sum(1, keepdim=True), torch.randint(4, (500,), generator=generator)


def test_ece_is_torchmetrics(data):
    p, y = data
    expected = float(multiclass_calibration_error(p, y, num_classes=4, n_bins=15, norm="l1"))
    assert metrics.ece(p, y) == pytest.approx(expected, abs=1e-6)


def test_by_hand():
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    y = torch.tensor([0, 0])
    assert metrics.accuracy(p, y) == 0.5
    assert metrics.nll(p, y) == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert metrics.brier(p, y) == pytest.approx((0.04 + 0.04 + 0.36 + 0.36) / 2)
    assert metrics.signed_gap(p, y) == pytest.approx(0.7 - 0.5)
    assert metrics.ece(p, y) == pytest.approx((0.2 + 0.6) / 2)


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


def test_best_temperature_recovers_a_known_one():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(20_000, 3, generator=generator, dtype=torch.float64) * 2
    y = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
    assert metrics.best_temperature(scores * 3, y) == pytest.approx(3.0, rel=0.05)
