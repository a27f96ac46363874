"""`--method blob`: the variational bound's KL and gradient against torch's own, and the particles."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from posterior.data.examples import collate
from posterior.likelihood.scores import scores
from posterior.models import lora
from posterior.particles import blob
from posterior.particles.blob import BlobTrainer
from posterior.training.map import Trainer, Training
from tests.posterior.conftest import make_examples

EXAMPLES = make_examples(6)


@pytest.fixture
def trainer(model) -> BlobTrainer:
    """Away from its start, and with a precision of its own for each matrix."""
    precision = {name: 3.0 + index for index, name in enumerate(lora.matrices(model))}
    run = BlobTrainer(model, EXAMPLES, precision, Training(batch_size=6, steps=10))
    generator = torch.Generator().manual_seed(5)
    for tensor in (*run.root.values(), *(module.weight for module in run.matrices.values())):
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    model.requires_grad_(True)
    return run


def bound_penalty(trainer: BlobTrainer, theta: lora.Theta, root: lora.Theta) -> torch.Tensor:
    """KL(q(A) || p(A)) + (lambda/2) |B|^2, by torch.distributions."""
    total = torch.zeros((), dtype=torch.float64)
    for name, value in theta.items():
        prior = Normal(trainer.origin[name], trainer.precision[name] ** -0.5)
        if name in root:
            total = total + kl_divergence(Normal(value, root[name].square()), prior).sum()
        else:
            total = total + trainer.precision[name] / 2 * (value - trainer.origin[name]).square().sum()
    return total


def test_penalty_is_the_kl(trainer):
    expected = bound_penalty(trainer, lora.get(trainer.model), trainer.root)
    torch.testing.assert_close(trainer.penalty(), expected, rtol=1e-10, atol=0)
    assert len(trainer.root) == 4 and all(name.endswith(".A") for name in trainer.root)


def test_gradient_is_that_of_the_reparametrised_bound(trainer):
    """Against autograd through A = M + G^2 E as a graph, to 1e-6 relative (Llama's norms are float32)."""
    model, batch, mean = trainer.model, collate(EXAMPLES), lora.get(trainer.model)
    torch.manual_seed(7)
    nll = trainer.gradient(batch)
    found = {name: parameter.grad.clone() for name, parameter in trainer.parameters.items()}
    assert all(torch.equal(value, mean[name]) for name, value in lora.get(model).items())
    torch.manual_seed(7)
    noise = {name: torch.randn(value.shape, dtype=torch.float64) for name, value in trainer.root.items()}

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> torch.Tensor:
            return -scores(model, batch).log_softmax(1).gather(1, batch.label[:, None]).mean()

    theta = {name: value.clone().requires_grad_() for name, value in mean.items()}
    root = {name: value.detach().clone().requires_grad_() for name, value in trainer.root.items()}
    keys = {id(parameter): f"inner.{key}" for key, parameter in model.named_parameters()}
    drawn = {
        keys[id(trainer.matrices[name].weight)]: value + root[name].square() * noise[name] if name in root else value
        for name, value in theta.items()
    }
    likelihood = torch.func.functional_call(Loss(), drawn, ())
    assert nll == pytest.approx(likelihood.item(), rel=1e-6)
    (likelihood + bound_penalty(trainer, theta, root) / len(EXAMPLES)).backward()
    for name, value in theta.items():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-6, atol=1e-8)
    for name, value in root.items():
        torch.testing.assert_close(found[f"{name}/root"], value.grad, rtol=1e-6, atol=1e-8)


def test_without_evidence_q_becomes_the_prior(model, monkeypatch):
    """A likelihood that is flat: M goes back to A_0 and Omega to the prior's standard deviation, within 1e-3."""
    precision = {name: 3.0 + index for index, name in enumerate(lora.matrices(model))}
    trainer = BlobTrainer(model, EXAMPLES, precision, Training(learning_rate=0.02, batch_size=6, steps=250))
    lora.put(model, {name: value + 0.1 for name, value in trainer.origin.items()})
    for root in trainer.root.values():
        root.data *= 0.3
    weights = [module.weight for module in trainer.matrices.values()]
    monkeypatch.setattr(blob, "log_likelihood", lambda *_: 0 * sum(weight.sum() for weight in weights)[None])
    while not trainer.done:
        trainer.run_epoch()
    for name, deviation in trainer.deviation().items():
        prior = trainer.precision[name] ** -0.5
        assert float((deviation / prior - 1).abs().max()) < 1e-3
        assert float((trainer.matrices[name].weight - trainer.origin[name]).abs().max()) < 1e-3 * prior


def test_q_starts_as_the_prior(model):
    trainer = BlobTrainer(model, EXAMPLES, dict.fromkeys(lora.matrices(model), 48.0), Training())
    for value in trainer.deviation().values():
        torch.testing.assert_close(value, torch.full_like(value, 48.0**-0.5))
    assert trainer.penalty().item() == pytest.approx(0, abs=1e-12)


def test_draws_are_of_q():
    """20,000 draws: mean and standard deviation of every entry of A within 5 standard errors; B as it is."""
    mean = {"one.A": torch.tensor([[1.0, -2.0]]), "one.B": torch.tensor([[3.0]])}
    deviation = {"one.A": torch.tensor([[0.5, 2.0]])}
    draws = [blob.draw(mean, deviation, seed) for seed in range(20_000)]
    a = torch.stack([each["one.A"] for each in draws])
    assert all(torch.equal(each["one.B"], mean["one.B"]) for each in draws[:5])
    assert bool(((a.mean(0) - mean["one.A"]).abs() < 5 * deviation["one.A"] / 20_000**0.5).all())
    assert bool(((a.std(0) / deviation["one.A"] - 1).abs() < 5 / 40_000**0.5).all())


def test_fit(run_fit, tmp_path):
    posterior = run_fit(method="blob", particles=3)
    assert posterior.family == "particles" and posterior.fit["method"] == "blob"
    assert 0.9 < posterior.fit["relative_deviation"] < 1.1 and posterior.fit["penalty"] > 0
    mean = lora.read_adapter(posterior.map_dir)
    thetas = [lora.read_adapter(folder) for folder in posterior.adapters(3, tmp_path)]
    for name, value in mean.items():
        same = [torch.equal(theta[name], value) for theta in thetas] + [torch.equal(thetas[0][name], thetas[1][name])]
        assert all(same) if name.endswith(".B") else not any(same)


def test_an_interrupted_fit_goes_on(run_fit, tmp_path, monkeypatch, capsys):
    whole = run_fit(tmp_path / "whole", method="blob", particles=2)
    original = Trainer.run_epoch

    def interrupted(self, progress):
        if self.epoch == 1:
            raise KeyboardInterrupt
        return original(self, progress)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit(tmp_path / "cut", method="blob", particles=2)
    monkeypatch.setattr(Trainer, "run_epoch", original)
    cut = run_fit(tmp_path / "cut", method="blob", particles=2)
    assert "resuming from" in capsys.readouterr().out
    assert cut.fit["history"] == whole.fit["history"]
    assert cut.fit["relative_deviation"] == whole.fit["relative_deviation"]
    for one, other in zip(whole.adapters(2, tmp_path), cut.adapters(2, tmp_path), strict=True):
        first, second = lora.read_adapter(one), lora.read_adapter(other)
        assert all(torch.equal(first[name], second[name]) for name in first)
