"""Text under the mixture against loops over particles and tokens, and identities that must hold."""

from __future__ import annotations

import math

import pytest
import torch

from posterior.predictive.decoding import Mixing, text_predictive

T, K = 7, 4


def random_text(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_p = -3 * torch.rand(T, K, generator=generator, dtype=torch.float64) - 0.01
    return log_p, torch.tensor([4.0, 3.0, 2.0, 1.0])


@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_logprob_and_weights_by_a_loop(mixing: Mixing) -> None:
    log_p, weights = random_text()
    entropies = torch.linspace(1, 2, T)
    result = text_predictive(log_p, weights.double().log(), mixing, entropies, entropies / 2)
    w = [value / 10 for value in (4, 3, 2, 1)]
    for t in range(T):
        p = [math.exp(float(log_p[t, k])) for k in range(K)]
        mean = sum(a * b for a, b in zip(w, p, strict=True))
        assert float(result.logprob[t]) == pytest.approx(math.log(mean), abs=1e-12)
        assert result.log_weights[t].exp().tolist() == pytest.approx(w, abs=1e-12)
        assert float(result.variance[t]) == pytest.approx(sum(a * (b - mean) ** 2 for a, b in zip(w, p, strict=True)))
        assert float(result.effective_particles[t]) == pytest.approx(1 / sum(a * a for a in w))
        if mixing == "sequence":
            w = [a * b / mean for a, b in zip(w, p, strict=True)]
    assert result.log_weights[-1].exp().tolist() == pytest.approx(w, abs=1e-12)


def test_sequence_mixing_is_the_exact_predictive_and_its_information_a_divergence() -> None:
    log_p, weights = random_text(1)
    w = weights.double() / weights.double().sum()
    result = text_predictive(log_p, weights.double().log(), "sequence", torch.ones(T), torch.ones(T))
    exact = float(torch.logsumexp(w.log() + log_p.sum(0), 0))
    assert float(result.logprob.sum()) == pytest.approx(exact, abs=1e-12)
    divergence = float((w * (w.log() - result.log_weights[-1])).sum())
    assert result.information == pytest.approx(divergence, abs=1e-6)
    assert result.expected == pytest.approx(float((w.double() * log_p.sum(0)).sum()), abs=1e-6)


@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_monte_carlo_error_matches_the_spread_over_posteriors(mixing: Mixing) -> None:
    """The standard error of log p(y|x, D) is the standard deviation over many draws of K particles, within 15 %."""
    generator = torch.Generator().manual_seed(0)
    k, values, errors = 64, [], []
    for _ in range(400):
        log_p = -0.5 - 0.3 * torch.randn(3, k, generator=generator, dtype=torch.float64).abs()
        result = text_predictive(log_p, torch.zeros(k), mixing, torch.ones(3), torch.ones(3))
        values.append(float(result.logprob.sum()))
        errors.append(result.mc_error)
    assert sum(errors) / len(errors) == pytest.approx(float(torch.tensor(values).std()), rel=0.15)


def test_one_particle_has_no_epistemic_part_and_no_text_is_certain() -> None:
    log_p = torch.full((T, 1), -0.7)
    one = text_predictive(log_p, torch.zeros(1), "sequence", torch.ones(T), torch.ones(T))
    assert one.information == one.mc_error == float(one.variance.sum()) == float(one.epistemic.sum()) == 0
    assert one.mean_probability == pytest.approx(math.exp(-0.7))
    none = text_predictive(torch.zeros(0, K), torch.zeros(K), "token", torch.zeros(0), torch.zeros(0))
    assert none.mean_probability == 1.0 and none.log_weights.shape == (1, K)


@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_a_particle_of_weight_zero_that_alone_expects_the_text_changes_nothing(mixing: Mixing) -> None:
    """Its ratio to the mixture, e^1200, is beyond any number."""
    log_p = torch.full((400, 3), -3.5, dtype=torch.float64)
    log_p[:, 1], log_p[:, 2] = -3.0, -0.5
    zero = torch.zeros(400)
    whole = text_predictive(log_p, torch.tensor([0.5, 0.5, 0.0]).log(), mixing, zero, zero)
    without = text_predictive(log_p[:, :2], torch.tensor([0.5, 0.5]).log(), mixing, zero, zero)
    assert math.isfinite(whole.mc_error) and whole.mc_error == pytest.approx(without.mc_error)
    assert whole.expected == pytest.approx(without.expected) and torch.allclose(whole.logprob, without.logprob)
    assert bool(whole.variance.isfinite().all())


def test_a_particle_of_weight_zero_changes_nothing() -> None:
    log_p, _ = random_text(2)
    some = text_predictive(log_p[:, :2], torch.tensor([0.6, 0.4]).log(), "sequence", torch.ones(T), torch.ones(T))
    more = text_predictive(log_p[:, :3], torch.tensor([0.6, 0.4, 0.0]).log(), "sequence", torch.ones(T), torch.ones(T))
    assert torch.allclose(some.logprob, more.logprob) and some.expected == pytest.approx(more.expected)


@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_the_parts_of_a_text_are_the_whole(mixing: Mixing) -> None:
    """Each part starts from the weights after the one before it, as a stream has them."""
    log_p, weights = random_text(3)
    entropies = torch.linspace(1, 2, T)
    whole = text_predictive(log_p, weights.double().log(), mixing, entropies, entropies / 2)
    log_weights = weights.double().log()
    for start, stop in ((0, 1), (1, 4), (4, T)):
        part = text_predictive(log_p[start:stop], log_weights, mixing, entropies[start:stop], entropies[start:stop] / 2)
        for name in ("logprob", "variance", "effective_particles", "total", "aleatoric", "epistemic", "particles"):
            assert torch.allclose(getattr(part, name), getattr(whole, name)[start:stop], rtol=1e-12, atol=1e-14), name
        log_weights = part.log_weights[-1]
    assert torch.allclose(log_weights, whole.log_weights[-1], rtol=1e-12)
