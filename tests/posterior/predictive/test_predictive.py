"""The posterior predictive against brute force, quadrature and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from posterior.predictive.mixture import among, entropy, from_gaussian, from_particles, normal_points

LOG_P = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], dtype=torch.float64).log()
WEIGHTS = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)


def test_probabilities_are_averaged_not_logits():
    """Trap 1: averaging logits and one softmax gives another (here visibly different) number."""
    result = from_particles(LOG_P, WEIGHTS)
    assert float(result.probability[0]) == pytest.approx(0.5 * 0.9 + 0.25 * 0.2 + 0.25 * 0.6)
    logits = (WEIGHTS[:, None] * LOG_P).sum(0).softmax(0)
    assert abs(float(logits[0] - result.probability[0])) > 0.01


def test_softmax_is_not_applied_twice():
    """Trap 2: unnormalised scores and log-probabilities of the same particles give the same predictive."""
    shifted = from_particles(LOG_P + torch.tensor([[3.0], [-2.0], [10.0]]), WEIGHTS)
    torch.testing.assert_close(shifted.probability, from_particles(LOG_P, WEIGHTS).probability)


def test_entropies_and_variances_by_loops():
    result = from_particles(LOG_P, WEIGHTS)
    p = LOG_P.exp().tolist()
    mean = [sum(w * row[c] for w, row in zip(WEIGHTS.tolist(), p, strict=True)) for c in range(2)]
    total = -sum(m * math.log(m) for m in mean)
    aleatoric = -sum(w * sum(x * math.log(x) for x in row) for w, row in zip(WEIGHTS.tolist(), p, strict=True))
    assert (result.total, result.aleatoric) == (pytest.approx(total), pytest.approx(aleatoric))
    assert result.epistemic == pytest.approx(total - aleatoric)
    concentration = sum(w * w for w in WEIGHTS.tolist())
    variance = sum(w * (row[0] - mean[0]) ** 2 for w, row in zip(WEIGHTS.tolist(), p, strict=True)) / (
        1 - concentration
    )
    assert float(result.variance[0]) == pytest.approx(variance)
    assert result.effective_particles == pytest.approx(1 / concentration)
    assert float(result.total_variance[0]) == pytest.approx(mean[0] * (1 - mean[0]))
    assert float(result.covariance[0, 1]) == pytest.approx(-variance)  # two answers: what one gains the other loses
    assert float(result.mc_error[0]) == pytest.approx(math.sqrt(variance * concentration))


def test_the_mixture_among_some_of_its_texts_is_the_mixture_normalised_over_them():
    """By loops: the mixture first, then the cut. An average of each particle's own shares is another number."""
    weights, p = (0.5, 0.3, 0.2), ((1e-6, 3e-6), (0.2, 0.1), (0.1, 0.4))
    result = among(torch.tensor(p).log(), torch.tensor(weights).log() + 7)
    joint = [[w * each for each in row] for w, row in zip(weights, p, strict=True)]
    everything = sum(map(sum, joint))
    mean = [sum(row[c] for row in joint) / everything for c in range(2)]
    assert result.probability.tolist() == pytest.approx(mean, rel=1e-6)
    given = [sum(row) / everything for row in joint]
    own = [-sum(q / sum(row) * math.log(q / sum(row)) for q in row) for row in joint]
    assert result.aleatoric == pytest.approx(sum(g * h for g, h in zip(given, own, strict=True)), rel=1e-6)
    assert result.total == pytest.approx(-sum(m * math.log(m) for m in mean), rel=1e-6)
    assert result.effective_particles == pytest.approx(1 / sum(g * g for g in given), rel=1e-6)
    assert abs(float(from_particles(torch.tensor(p).log(), torch.tensor(weights)).probability[0]) - mean[0]) > 0.05


def test_a_particle_that_gives_none_of_the_texts_any_probability_is_out():
    log_p = torch.tensor([[-math.inf, -math.inf], [-800.0, -801.0]], dtype=torch.float64)
    result = among(log_p, torch.tensor([0.9, 0.1]).log())
    assert result.probability.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    assert result.effective_particles == 1.0 and result.epistemic == 0.0


def test_one_particle_has_no_spread_and_agreeing_particles_no_epistemic_entropy():
    one = from_particles(LOG_P[:1], torch.ones(1))
    assert one.epistemic == 0.0 and float(one.variance.sum()) == 0.0
    same = from_particles(LOG_P[:1].repeat(5, 1), torch.ones(5))
    assert same.epistemic == pytest.approx(0.0, abs=1e-12)


def test_interval_is_the_weighted_quantile():
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    result = from_particles(torch.stack([p, 1 - p], 1).log(), torch.ones(99), coverage=0.9)
    assert result.interval[0].tolist() == pytest.approx([0.05, 0.95], abs=0.011)


@pytest.mark.parametrize("k", [4, 20, 40, 100, 1000])
def test_interval_ends_at_the_value_that_reaches_its_level(k):
    """Levels 0.25 and 0.75 are reached by a quarter and three quarters of equal weights, however their sums are
    rounded: not by the next value."""
    p = torch.linspace(0.01, 0.99, k, dtype=torch.float64)
    result = from_particles(torch.stack([p, 1 - p], 1).log(), torch.ones(k), coverage=0.5)
    torch.testing.assert_close(result.interval[0], p[[k // 4 - 1, 3 * k // 4 - 1]])


def test_interval_of_unequal_weights():
    """By hand: weights 0, 0.3, 0.5, 0.2, 0 of rising values, so the CDF is 0.3, 0.8, 1 at the middle three. Equal
    values add their weights up."""
    p = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    log_p = torch.stack([p, 1 - p], 1).log()
    weights = torch.tensor([0.0, 3.0, 5.0, 2.0, 0.0])
    for coverage, expected in ((0.2, [0.5, 0.5]), (0.5, [0.3, 0.5]), (0.9, [0.3, 0.7]), (1 - 1e-13, [0.3, 0.7])):
        for order in (slice(None), [3, 1, 4, 0, 2]):
            result = from_particles(log_p[order], weights[order], coverage)
            assert result.interval[0].tolist() == pytest.approx(expected)
    halves = from_particles(log_p[[1, 1, 2, 3]], torch.tensor([2.0, 1.0, 5.0, 2.0]), 0.5)
    assert halves.interval[0].tolist() == pytest.approx([0.3, 0.5])
    one = from_particles(log_p[:1], torch.ones(1))
    assert one.interval[0].tolist() == pytest.approx([0.1, 0.1])


def test_normal_points():
    """Scrambles times a power of two points, in double precision. No two scrambles are the same, and each has a point
    in each of 64 equally probable slices of each coordinate."""
    points = normal_points(3, 1000, 0, 16)
    assert points.shape == (16 * 64, 3) and points.dtype == torch.float64
    assert normal_points(3, 5, 0, 16).shape == (16, 3)
    each = points.view(16, 64, 3)
    assert len(each[:, 0, 0].unique()) == 16
    slices = (torch.special.ndtr(each) * 64).long().sort(1).values
    assert torch.equal(slices, torch.arange(64)[None, :, None].expand_as(slices))
    normal_points.cache_clear()
    assert torch.equal(normal_points(3, 1000, 0, 16), points)
    assert not torch.equal(normal_points(3, 1000, 1, 16), points)


def test_zero_probability_is_fine():
    log_p = torch.tensor([[0.0, -math.inf], [-0.1, math.log(1 - math.exp(-0.1))]])
    result = from_particles(log_p, torch.ones(2))
    assert math.isfinite(result.total) and math.isfinite(result.epistemic)
    assert float(entropy(torch.tensor([1.0, 0.0]))) == 0.0


@pytest.mark.parametrize(("mean", "variance"), [(0.3, 0.5), (2.0, 4.0), (-1.0, 20.0), (5.0, 0.0)])
def test_gaussian_predictive_is_the_integral(mean, variance):
    """Two answers: E[sigmoid(f)] by quadrature; the returned Monte-Carlo error is honest (within 5 of it) and below
    2e-3."""
    covariance = torch.tensor([[0.0, 0.0], [0.0, variance]])
    result = from_gaussian(torch.tensor([0.0, mean]), covariance)
    if variance:
        density = stats.norm(mean, math.sqrt(variance))
        spread = 12 * math.sqrt(variance)
        exact, _ = integrate.quad(lambda f: density.pdf(f) / (1 + math.exp(-f)), mean - spread, mean + spread)
    else:
        exact = 1 / (1 + math.exp(-mean))
    error = float(result.mc_error[1])
    assert error < 2e-3
    assert abs(float(result.probability[1]) - exact) <= 5 * error + 1e-9
    assert float(result.probability.sum()) == pytest.approx(1.0)


def test_gaussian_predictive_is_reproducible_and_shift_invariant():
    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64)
    mean, covariance = torch.randn(4, dtype=torch.float64), root @ root.T
    first, second = from_gaussian(mean, covariance), from_gaussian(mean, covariance)
    assert torch.equal(first.probability, second.probability)
    shifted = from_gaussian(mean + 5, covariance)
    torch.testing.assert_close(shifted.probability, first.probability)
    assert first.total >= first.aleatoric >= 0 and bool((first.interval[:, 0] <= first.interval[:, 1]).all())


def test_more_variance_means_less_confidence():
    confidence = [
        float(from_gaussian(torch.tensor([0.0, 2.0]), torch.diag(torch.tensor([0.0, v]))).probability.max())
        for v in (0, 1, 10, 100)
    ]
    assert confidence == sorted(confidence, reverse=True)
