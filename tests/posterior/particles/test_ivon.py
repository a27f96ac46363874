"""`--method ivon`: the optimiser against the paper's formulas and a model of known optimum, and the particles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from posterior.data.examples import collate
from posterior.likelihood.scores import log_likelihood
from posterior.models import lora
from posterior.particles.ivon import IvonTrainer, OnlineNewton
from posterior.training.map import Trainer, Training
from tests.posterior.conftest import make_examples

EXAMPLES = make_examples(6)


def steps(optimizer: OnlineNewton, mean: Tensor, inputs: list[tuple[Tensor, Tensor]]) -> None:
    """One step for each gradient and estimate of the Hessian."""
    for gradient, estimate in inputs:
        mean.grad = gradient
        optimizer.state[mean]["estimate"] = estimate
        optimizer.step()


def random(count: int, *shape: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randn(count, 2, *shape, generator=generator, dtype=torch.float64)
    return [(gradient, 0.5 * estimate) for gradient, estimate in pairs]


def test_steps_are_the_paper_s_algorithm():
    """Entry by entry in plain numbers, with every constant away from its default; some steps are clipped."""
    beta1, beta2, delta, radius, rate, h0 = 0.8, 0.7, 0.3, 1.5, 0.06, 0.2
    mean = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    origin, start = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64), mean.tolist()
    inputs = random(12, 3)
    group = {"params": [mean], "origin": origin, "delta": delta, "hessian": h0}
    optimizer = OnlineNewton([group], rate, momentum=beta1, memory=beta2, radius=radius)
    steps(optimizer, mean, inputs)
    clipped = 0
    for i in range(3):
        m, h, average = start[i], h0, 0.0
        for t, (gradient, estimate) in enumerate(inputs, 1):
            average = beta1 * average + (1 - beta1) * float(gradient[i])
            f = float(estimate[i])
            h = beta2 * h + (1 - beta2) * f + 0.5 * (1 - beta2) ** 2 * (h - f) ** 2 / (h + delta)
            newton = (average / (1 - beta1**t) + delta * (m - float(origin[i]))) / (h + delta)
            clipped += abs(newton) > radius
            m -= rate / radius * max(-radius, min(radius, newton))
        assert float(mean[i]) == pytest.approx(m, rel=1e-12)
        assert float(optimizer.state[mean]["hessian"][i]) == pytest.approx(h, rel=1e-12)
    assert 0 < clipped < 36


def test_no_estimate_makes_a_variance_negative():
    """h + delta at most halves in a step, whatever the estimate: at a memory of .5, -2 (h + delta) does it."""
    mean = torch.zeros(1, dtype=torch.float64)
    optimizer = OnlineNewton([{"params": [mean], "origin": mean.clone(), "delta": 0.25}], 1e-3, memory=0.5)
    for power in range(1, 10):
        h = float(optimizer.state[mean]["hessian"])
        steps(optimizer, mean, [(torch.zeros_like(mean), torch.full_like(mean, h - 2 * (h + 0.25)))])
        assert float(optimizer.state[mean]["hessian"]) + 0.25 == pytest.approx(0.25 * 0.5**power, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_a_linear_gaussian_model_s_optimum_is_reached(temperature):
    """y = X theta + noise: the best diagonal Gaussian has the posterior's mean, and variances T / P_ii of its precision
    P = X^T X / s^2 + Lambda. Means within .03 standard deviations, variances within 2 %: averages over 64 runs and the
    last half of their steps."""
    generator = torch.Generator().manual_seed(1)
    rows, runs, count, noise = 40, 64, 2000, 0.5
    mixing = torch.tensor([[1, 0.5, 0, 0], [0, 1, 0.4, 0], [0, 0, 0.3, 0], [0, 0, 0, 0.05]], dtype=torch.float64)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64) @ mixing
    y = x @ torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
    y += noise * torch.randn(rows, generator=generator, dtype=torch.float64)
    prior, origin = 3.0, torch.tensor([0.2, 0.0, -0.2, 1.0], dtype=torch.float64)
    precision = x.T @ x / noise**2 + prior * torch.eye(4, dtype=torch.float64)
    best = torch.linalg.solve(precision, x.T @ y / noise**2 + prior * origin)
    variance = temperature / precision.diagonal()
    assert float(variance.max() / variance.min()) > 10  # the entries differ

    mean, delta, size = torch.zeros(runs, 4, dtype=torch.float64), prior / rows, rows / temperature
    optimizer = OnlineNewton([{"params": [mean], "origin": origin, "delta": delta}], 1.0, memory=0.996, radius=10.0)
    means, variances = [], []
    for step in range(count):
        optimizer.param_groups[0]["lr"] = 1 - step / count
        found = (size * (optimizer.state[mean]["hessian"] + delta)).reciprocal()
        if step >= count / 2:
            means.append(mean.clone())
            variances.append(found)
        eps = torch.randn(runs, 4, generator=generator, dtype=torch.float64)
        residual = (mean + found.sqrt() * eps) @ x.T - y
        gradient = residual @ x / noise**2 / rows
        steps(optimizer, mean, [(gradient, gradient * eps / found.sqrt())])
    assert float(((torch.stack(means).mean((0, 1)) - best) / variance.sqrt()).abs().max()) < 0.03
    assert float((torch.stack(variances).mean((0, 1)) / variance - 1).abs().max()) < 0.02


@pytest.fixture
def trainer(model) -> IvonTrainer:
    """With a precision of its own for each matrix, and curvature that has been learned."""
    precision = {name: 3.0 + index for index, name in enumerate(lora.matrices(model))}
    run = IvonTrainer(model, EXAMPLES, precision, Training(batch_size=6, steps=10), temperature=0.25)
    generator = torch.Generator().manual_seed(5)
    for parameter in run.parameters.values():
        hessian = run.optimizer.state[parameter]["hessian"]
        hessian += torch.rand(hessian.shape, generator=generator, dtype=torch.float64)
    model.requires_grad_(True)
    return run


def test_a_gradient_is_at_a_draw_of_q(trainer):
    """g at m + sigma eps by autograd on its own, h_hat = g eps / sigma; the model has its mean again."""
    model, batch, mean = trainer.model, collate(EXAMPLES), lora.get(trainer.model)
    torch.manual_seed(7)
    nll = trainer.gradient(batch)
    assert all(torch.equal(value, mean[name]) for name, value in lora.get(model).items())
    found = {name: parameter.grad.clone() for name, parameter in trainer.parameters.items()}
    torch.manual_seed(7)
    theta, scaled = {}, {}
    for index, (name, value) in enumerate(mean.items()):
        h = trainer.optimizer.state[trainer.parameters[name]]["hessian"]
        sigma = (6 / 0.25 * (h + (3 + index) / 6)) ** -0.5
        eps = torch.randn(value.shape, dtype=torch.float64)
        theta[name], scaled[name] = value + sigma * eps, eps / sigma
    lora.put(model, theta)
    model.zero_grad()
    expected = -log_likelihood(model, batch).mean()
    expected.backward()
    assert nll == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in trainer.parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-9)
        estimate = trainer.optimizer.state[parameter]["estimate"]
        torch.testing.assert_close(estimate, parameter.grad * scaled[name], rtol=1e-6, atol=1e-9)


def test_q_starts_as_the_tempered_prior(model):
    run = IvonTrainer(model, EXAMPLES, dict.fromkeys(lora.matrices(model), 48.0), Training(), temperature=0.09)
    for value in run.deviation().values():
        torch.testing.assert_close(value, torch.full_like(value, 0.3 / math.sqrt(48)))


def test_without_evidence_the_mean_goes_back_to_the_prior_s(model, monkeypatch):
    """A likelihood that is flat: m ends within 1e-3 of theta_0, sigma stays the tempered prior's."""
    precision = {name: 3.0 + index for index, name in enumerate(lora.matrices(model))}
    training = Training(learning_rate=1e-2, batch_size=6, steps=60)
    run = IvonTrainer(model, EXAMPLES, precision, training, temperature=0.25)
    lora.put(model, {name: value + 0.1 for name, value in run.origin.items()})
    monkeypatch.setattr(run, "loss", lambda batch: sum(0 * p.sum() for p in run.parameters.values()))
    while not run.done:
        run.run_epoch()
    for name, value in lora.get(model).items():
        assert float((value - run.origin[name]).abs().max()) < 1e-3
        torch.testing.assert_close(run.deviation()[name], torch.full_like(value, 0.5 * precision[name] ** -0.5))


def test_fit(run_fit, tmp_path):
    """Every matrix of every particle is a draw around map/; the same seed gives the same posterior."""
    posterior = run_fit(method="ivon", particles=3)
    assert posterior.family == "particles" and posterior.fit["method"] == "ivon"
    assert posterior.fit["temperature"] == 0.01
    assert all(0.5 < each < 1.5 for each in posterior.fit["relative_deviation"].values())
    mean = lora.read_adapter(posterior.map_dir)
    thetas = [lora.read_adapter(folder) for folder in posterior.adapters(3, tmp_path)]
    for name, value in mean.items():
        prior = 0.1 * (10.0 if name.endswith(".B") else 3.0 * value.shape[1]) ** -0.5
        for theta in thetas:
            assert 0.3 < float((theta[name] - value).square().mean().sqrt()) / prior < 2
        assert not torch.equal(thetas[0][name], thetas[1][name])
    assert run_fit(tmp_path / "again", method="ivon", particles=3).hash == posterior.hash
    assert run_fit(tmp_path / "other", method="ivon", particles=3, seed=1).hash != posterior.hash


def test_an_interrupted_fit_goes_on(run_fit, tmp_path, monkeypatch, capsys):
    whole = run_fit(tmp_path / "whole", method="ivon", particles=2)
    original = Trainer.run_epoch

    def interrupted(self: Trainer, progress: Any) -> float:
        if self.epoch == 1:
            raise KeyboardInterrupt
        return original(self, progress)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit(tmp_path / "cut", method="ivon", particles=2)
    monkeypatch.setattr(Trainer, "run_epoch", original)
    cut = run_fit(tmp_path / "cut", method="ivon", particles=2)
    assert "resuming from" in capsys.readouterr().out
    assert cut.fit["history"] == whole.fit["history"]
    for one, other in zip(whole.adapters(2, tmp_path), cut.adapters(2, tmp_path), strict=True):
        first, second = lora.read_adapter(one), lora.read_adapter(other)
        assert all(torch.equal(first[name], second[name]) for name in first)
