"""`--method tfb`: the noise is isotropic in the update, and sigma the largest within the tolerance."""

from __future__ import annotations

import pytest
import torch

from posterior.data.examples import collate, encode
from posterior.data.reading import read_rows
from posterior.errors import PosteriorError
from posterior.likelihood.scores import log_likelihood
from posterior.models import lora
from posterior.models.base import load_model, load_tokenizer, resolve
from posterior.particles import tfb


def theta_of(rank: int, seed: int = 0) -> lora.Theta:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(6, rank, generator=generator).double() * torch.tensor([5.0, 0.1, 1.0])[:rank]
    return {"one.A": torch.randn(rank, 4, generator=generator).double(), "one.B": b}


def test_the_update_s_noise_has_one_size_in_every_direction_of_b():
    """Covariance of vec(B (A_k - A)) is sigma^2 (U U^T) (x) I, U an orthonormal basis of B's columns."""
    theta, sigma, count = theta_of(3), 0.7, 20_000
    draws = torch.stack(
        [
            theta["one.B"] @ (tfb.moved(theta, tfb.perturbation(theta, seed), sigma)["one.A"] - theta["one.A"])
            for seed in range(count)
        ]
    )
    q, _ = torch.linalg.qr(theta["one.B"])
    expected = sigma**2 * torch.kron(q @ q.T, torch.eye(4, dtype=torch.float64))
    found = draws.flatten(1).T @ draws.flatten(1) / count
    assert float((found - expected).abs().max()) < 5 * 2**0.5 * sigma**2 / count**0.5


def test_directions_that_b_ignores_get_no_noise():
    theta = theta_of(2)
    theta["one.B"][:, 1] = 2 * theta["one.B"][:, 0]  # rank 1
    noise = tfb.perturbation(theta, 0)["one.A"]
    assert bool(torch.isfinite(noise).all()) and int(torch.linalg.matrix_rank(noise, rtol=1e-6)) == 1
    theta["one.B"].zero_()
    assert not tfb.perturbation(theta, 0)["one.A"].any()


@pytest.mark.parametrize("limit", [0.0123, 0.001, 3.7, 2e-6])
def test_sigma_is_the_largest_within(limit):
    tried: list[float] = []

    def within(sigma: float) -> bool:
        tried.append(sigma)
        return sigma <= limit

    found = tfb.largest(within)
    assert found in tried and found <= limit < found * 1.01
    assert found == max(sigma for sigma in tried if sigma <= limit)


def test_a_tolerance_that_cannot_be_met_is_refused():
    with pytest.raises(PosteriorError, match="costs more than tolerance"):
        tfb.largest(lambda sigma: False)
    with pytest.raises(PosteriorError, match="no sigma up to 1000"):
        tfb.largest(lambda sigma: True)


def test_fit_spends_the_tolerance(run_fit, tiny_base, tmp_path):
    trained = run_fit(tmp_path / "trained", method="ensemble", particles=1, learning_rate=0.02)
    posterior = run_fit(method="tfb", adapter=trained.map_dir, particles=4, tolerance=0.01)
    base = resolve(str(tiny_base))
    batch = collate(encode(posterior.task, load_tokenizer(base), read_rows(tmp_path / "data.jsonl")))
    model = lora.load_peft(load_model(base, torch.float32, "cpu"), posterior.map_dir)
    theta, given = lora.get(model), lora.read_adapter(trained.map_dir)
    assert all(torch.equal(theta[name], given[name]) for name in theta)
    with torch.no_grad():
        own = -float(log_likelihood(model, batch).double().sum())
        rows = []
        for folder in posterior.adapters(4, tmp_path):
            lora.put(model, lora.read_adapter(folder))
            rows.append(log_likelihood(model, batch).double().exp())
    spread = -float(torch.stack(rows).mean(0).log().sum())
    assert 1.005 < spread / own <= 1.01001  # sigma is known to a hundredth, and the loss may be steep there
    assert posterior.fit["sigma"] > 0 and posterior.prior == {}


def test_it_needs_an_adapter(run_fit):
    with pytest.raises(PosteriorError, match="give --adapter"):
        run_fit(method="tfb")
    with pytest.raises(PosteriorError, match="--tolerance is 0.0; it must be above 0"):
        run_fit(method="tfb", adapter="/nowhere", tolerance=0)
