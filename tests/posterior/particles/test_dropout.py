"""`--method dropout`: a particle is the trained adapter behind a fixed mask of its input."""

from __future__ import annotations

import pytest
import torch

from posterior.errors import PosteriorError
from posterior.models import lora
from posterior.particles import dropout


def test_a_particle_is_the_adapter_with_masked_inputs(run_fit, tmp_path):
    posterior = run_fit(method="dropout", particles=4, dropout=0.25)
    theta = lora.read_adapter(posterior.map_dir)
    masks = []
    for folder in posterior.adapters(4, tmp_path):
        found = lora.read_adapter(folder)
        for name, value in theta.items():
            if name.endswith(".B"):
                assert torch.equal(found[name], value)
                continue
            ratio = found[name] / value
            assert torch.equal(ratio.round(decimals=4).unique(), torch.tensor([0.0, 4 / 3]).round(decimals=4))
            assert torch.equal(ratio[0] > 0, ratio[1] > 0)  # a column goes as one
            masks.append(ratio[0] > 0)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[4])


def test_the_mean_of_the_particles_is_the_adapter():
    theta = {"one.A": torch.randn(2, 200, generator=torch.Generator().manual_seed(0)), "one.B": torch.ones(3, 2)}
    draws = torch.stack([dropout.masked(theta, 0.3, seed)["one.A"] for seed in range(2000)])
    x = torch.ones(200)
    error = (0.3 / 0.7 * theta["one.A"].square().sum(1) / 2000).sqrt()  # standard error of the mean of A_k x
    assert bool(((draws.mean(0) @ x - theta["one.A"] @ x).abs() < 4 * error).all())
    kept = (draws[:, 0] != 0).float().mean()
    assert float(kept) == pytest.approx(0.7, abs=0.005)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "needs a --dropout above 0"),
        ({"dropout": 1.0}, "at least 0 and at most 0.999"),
        ({"dropout": -0.1}, "at most 0.999"),
    ],
)
def test_bad_input_is_one_sentence(run_fit, options, match):
    with pytest.raises(PosteriorError, match=match):
        run_fit(method="dropout", **options)
