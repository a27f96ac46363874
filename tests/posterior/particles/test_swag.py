"""`--method swag`: the Gaussian of the snapshots, and when they are taken."""

from __future__ import annotations

import pytest
import torch

from posterior.errors import PosteriorError
from posterior.models import lora
from posterior.particles import swag
from posterior.particles.swag import SwagTrainer
from posterior.training.map import Training
from tests.posterior.conftest import make_examples, tiny_llama


def test_draws_have_the_formula_s_mean_and_covariance():
    generator = torch.Generator().manual_seed(0)
    snapshots = [
        {
            "one.A": torch.randn(1, 3, generator=generator).double(),
            "one.B": torch.randn(2, 1, generator=generator).double(),
        }
        for _ in range(4)
    ]
    flat = torch.stack([torch.cat([value.flatten() for value in one.values()]) for one in snapshots])
    deviations = flat - flat.mean(0)
    expected = flat.var(0, unbiased=False).diag() / 2 + deviations.T @ deviations / (2 * 3)
    count = 20_000
    draws = torch.stack(
        [torch.cat([value.flatten() for value in swag.sample(snapshots, seed).values()]) for seed in range(count)]
    )
    scale = expected.diagonal().sqrt()
    assert float(((draws.mean(0) - flat.mean(0)) / scale).abs().max()) < 5 / count**0.5
    difference = (draws.T.cov() - expected) / (scale[:, None] * scale)
    assert float(difference.abs().max()) < 5 * 2**0.5 / count**0.5
    assert float(expected[0, 4].abs()) > 0.05  # the matrices are coupled


@pytest.mark.parametrize(("steps", "expected"), [(4, 2), (40, 20), (41, 11), (100, 17)])
def test_snapshots_are_of_the_second_half_the_last_step_too(steps, expected):
    model = lora.attach(tiny_llama(), rank=2, alpha=4)
    trainer = SwagTrainer(
        model, make_examples(4), dict.fromkeys(lora.matrices(model), 1.0), Training(batch_size=4, steps=steps)
    )
    rates = []
    while not trainer.done:
        rates.append(trainer.rate())
        trainer.run_epoch()
    assert len(trainer.snapshots) == expected
    last = lora.get(model)
    assert all(torch.equal(trainer.snapshots[-1][name], last[name]) for name in last)
    half = steps // 2
    assert rates[half:] == [0.0005] * (steps - half)


def test_fit(run_fit, tmp_path):
    posterior = run_fit(method="swag", particles=3)
    assert posterior.family == "particles" and posterior.fit["snapshots"] == 2
    thetas = [lora.read_adapter(folder) for folder in posterior.adapters(3, tmp_path)]
    assert not torch.equal(
        thetas[0]["model.layers.0.self_attn.q_proj.A"], thetas[1]["model.layers.0.self_attn.q_proj.A"]
    )


def test_an_interrupted_fit_goes_on_with_its_snapshots(run_fit, tmp_path, monkeypatch, capsys):
    """Killed before the last of four epochs, when the first snapshots are taken."""
    options = {"method": "swag", "particles": 2, "epochs": 4}
    whole = run_fit(tmp_path / "whole", **options)
    original = SwagTrainer.run_epoch

    def interrupted(self, progress):
        if self.epoch == 3:
            assert self.snapshots
            raise KeyboardInterrupt
        return original(self, progress)

    monkeypatch.setattr(SwagTrainer, "run_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit(tmp_path / "cut", **options)
    monkeypatch.setattr(SwagTrainer, "run_epoch", original)
    cut = run_fit(tmp_path / "cut", **options)
    assert "resuming from" in capsys.readouterr().out
    assert cut.fit["snapshots"] == whole.fit["snapshots"] and cut.fit["history"] == whole.fit["history"]
    for one, other in zip(whole.adapters(2, tmp_path), cut.adapters(2, tmp_path), strict=True):
        first, second = lora.read_adapter(one), lora.read_adapter(other)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_too_few_steps_are_refused(run_fit):
    with pytest.raises(PosteriorError, match="at least 2 snapshots, but trains 2 steps"):
        run_fit(method="swag", steps=2)
