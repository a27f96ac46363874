"""Each calibrator against a grid, an optimum or a property."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from posterior.calibration import metrics, scalers
from posterior.calibration.scalers import CALIBRATORS, Isotonic, Platt, Temperature, Vector
from tests.posterior.calibration.made import draw, ragged


def test_temperature_is_the_best_of_a_grid() -> None:
    p, y = draw(500)
    found = Temperature.fit(p, y).temperature
    grid = torch.linspace(0.2, 8, 4000, dtype=torch.float64)
    losses = [metrics.nll((p.log() / t).softmax(1), y) for t in grid]
    assert found == pytest.approx(float(grid[int(np.argmin(losses))]), abs=4e-3)
    assert found > 1.5, "the probabilities are over-confident"


@pytest.mark.long
def test_the_temperature_of_rows_of_different_widths_is_the_best_of_a_grid() -> None:
    """By a loop over rows with their own options; what is behind them says nothing."""
    p, y, widths = ragged(300)
    found = Temperature.fit(p, y).temperature
    rows = [row[:width].log() for row, width in zip(p, widths, strict=True)]
    grid = torch.linspace(0.5, 8, 800, dtype=torch.float64)
    losses = [sum(-(row / t).log_softmax(0)[label] for row, label in zip(rows, y, strict=True)) for t in grid]
    assert found == pytest.approx(float(grid[int(np.argmin(losses))]), abs=0.02)
    assert found > 1.5, "the probabilities are over-confident"
    wider = torch.cat([p, torch.zeros(len(p), 250, dtype=torch.float64)], 1)
    assert Temperature.fit(wider, y).temperature == pytest.approx(found, rel=1e-12)


def test_a_true_answer_without_probability_leaves_the_temperature_finite() -> None:
    p, y = draw(200)
    p[0] = torch.nn.functional.one_hot((y[0] + 1) % 3, 3).double()
    assert 1.5 < Temperature.fit(p, y).temperature < 50


def test_vector_scaling_is_the_optimum_and_improves_its_own_rows() -> None:
    p, y = draw(300)
    found = Vector.fit(p, y)
    after = found.apply(p)
    assert metrics.nll(after, y) < metrics.nll(Temperature.fit(p, y).apply(p), y) < metrics.nll(p, y)
    parameters = torch.tensor([found.scale, found.bias], dtype=torch.float64, requires_grad=True)
    log_q = (p.log() * parameters[0] + parameters[1]).log_softmax(1)
    prior = ((parameters[0] - 1).square().sum() + parameters[1].square().sum()) / 2
    (gradient,) = torch.autograd.grad(prior - log_q.gather(1, y[:, None]).sum(), parameters)
    assert float(gradient.abs().max()) / len(y) < 1e-4, "autograd finds no way down"


def test_isotonic_is_monotone_never_certain_and_its_blocks_are_frequencies() -> None:
    p, y = draw(400)
    found = Isotonic.fit(p, y)
    grid = torch.linspace(0.34, 1, 500, dtype=torch.float64)
    rows = torch.stack([grid, (1 - grid) / 2, (1 - grid) / 2], 1)
    q = found.apply(rows)[:, 0]
    assert bool((q.diff() >= -1e-9).all()) and 1 / 402 <= float(q.min()) <= float(q.max()) <= 401 / 402 + 1e-9
    after, right = found.apply(p).max(1).values.round(decimals=9), (p.argmax(1) == y).double()
    for level in after.unique():
        if 0.334 < level < 0.99:  # of three answers the top one has a third or more
            assert float(right[after == level].mean()) == pytest.approx(float(level))


def test_platt_is_the_optimum_of_softened_labels() -> None:
    p, y = draw(300)
    found = Platt.fit(p, y)
    right = p.argmax(1) == y
    target = torch.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2)).double()
    parameters = torch.tensor([found.slope, found.intercept], dtype=torch.float64, requires_grad=True)
    z = p.max(1).values.logit() * parameters[0] + parameters[1]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, target)
    (gradient,) = torch.autograd.grad(loss, parameters)
    assert float(gradient.abs().max()) < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_a_confidence_leaves_the_answer_and_the_order(seed: int) -> None:
    """Of three answers or more. What is taken from the top answer is a temperature's, found here by scipy."""
    p, _ = draw(40, seed=seed, c=4)
    top, wanted = p.max(1).values, torch.linspace(0.26, 0.99, 40, dtype=torch.float64)
    q = scalers._with_confidence(p, wanted)
    assert torch.allclose(q.max(1).values, wanted, atol=1e-9) and torch.allclose(q.sum(1), torch.ones(40).double())
    assert torch.equal(q.argsort(1), p.argsort(1))
    for old, new, confidence, before in zip(p, q, wanted.tolist(), top.tolist(), strict=True):
        if confidence > before:
            factor = new / old
            assert factor[old == before].tolist() == pytest.approx([confidence / before])
            assert factor[old < before].tolist() == pytest.approx([(1 - confidence) / (1 - before)] * 3)
        else:
            t = brentq(lambda t, old=old, c=confidence: float((old.log() / t).softmax(0).max()) - c, 1, 1e6)
            assert torch.allclose(new, (old.log() / t).softmax(0), atol=1e-9)


def test_a_confidence_below_chance() -> None:
    four = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    q = scalers._with_confidence(four, torch.tensor(0.1).double())
    assert 0.25 < float(q.max()) < 0.25001 and torch.equal(q.argsort(), four.argsort()), "the answer stays"
    two = scalers._with_confidence(torch.tensor([0.7, 0.3]).double(), torch.tensor(0.4).double())
    assert two.tolist() == pytest.approx([0.4, 0.6]), "of two, the other one must be likelier"


def test_a_lower_confidence_is_still_true_of_the_answer_that_is_given() -> None:
    """Far too sure of one of four: the share of right answers is what Platt's confidence says, on rows not seen."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    y = torch.multinomial((scores / 2).softmax(1), 1, generator=generator)[:, 0]
    p = (4 * scores).softmax(1)
    q = Platt.fit(p[:1000], y[:1000]).apply(p)
    assert metrics.accuracy(q, y) == metrics.accuracy(p, y)
    assert abs(metrics.signed_gap(q[1000:], y[1000:])) < 0.04 < metrics.signed_gap(p[1000:], y[1000:]) / 5
    assert metrics.nll(q[1000:], y[1000:]) < math.log(4), "a second answer that passed the first made it worse"


def test_methods_of_the_top_answer_stay_finite_when_every_answer_is_right() -> None:
    p, _ = draw(100)
    for method in (Isotonic, Platt, Vector):
        q = method.fit(p, p.argmax(1)).apply(p)
        assert bool(torch.isfinite(q).all()) and float(q.max(1).values.min()) < 1


@pytest.mark.parametrize("method", CALIBRATORS)
def test_every_method_gives_distributions_on_any_shape_and_certainty(method: scalers.Method) -> None:
    calibrator = CALIBRATORS[method].fit(*draw(100))
    hard = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3] * 3], dtype=torch.float64)
    for p in (hard, hard[0], hard[None, None], draw(20, seed=1)[0]):
        q = calibrator.apply(p)
        assert q.shape == p.shape and bool((q >= 0).all())
        assert torch.allclose(q.sum(-1), torch.ones(p.shape[:-1], dtype=torch.float64))


@pytest.mark.parametrize("method", [method for method in CALIBRATORS if method != "none"])
def test_calibration_helps_on_rows_it_did_not_see(method: scalers.Method) -> None:
    calibrator = CALIBRATORS[method].fit(*draw(1000))
    p, y = draw(4000, seed=1)
    q = calibrator.apply(p)
    assert metrics.ece(q, y) < metrics.ece(p, y) / 2 and metrics.nll(q, y) < metrics.nll(p, y)
