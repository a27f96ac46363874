"""SVGD: the update against densities with known moments, autograd and dense products; the fit from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy.spatial.distance import pdist, squareform
from torch import Tensor
from transformers import AutoModelForCausalLM

from posterior.data.examples import collate
from posterior.errors import PosteriorError
from posterior.laplace import blockwise
from posterior.likelihood.scores import log_likelihood
from posterior.likelihood.stacked import stack, stacked, unstack
from posterior.models import lora
from posterior.particles import svgd
from posterior.particles.svgd import Kernel, SvgdTrainer, direction
from posterior.storage import artefact
from posterior.training.map import Trainer, Training
from tests.posterior.conftest import make_examples, tiny_llama

EXAMPLES = make_examples(10)


def travel(log_p: Callable[[Tensor], Tensor], start: Tensor, steps: int, **options) -> Tensor:
    """Particles [K, D] after `steps` of Adam on phi."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(steps):
        (score,) = torch.autograd.grad(log_p(x).sum(), x)
        phi, _ = direction({"x": x.detach()}, {"x": score}, "parameters", **options)
        x.grad = -phi["x"]
        optimizer.step()
    return x.detach()


def normal(count: int) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_a_gaussian_has_its_moments_and_the_temperature_widens_it(temperature):
    mean = torch.tensor([1.0, -2.0]).double()
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]]).double()
    target = torch.distributions.MultivariateNormal(mean, covariance)
    found = travel(target.log_prob, normal(60), 1000, temperature=temperature)
    torch.testing.assert_close(found.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(found.T.cov(), temperature * covariance, rtol=0.15, atol=0.05)


def crescents(z: Tensor) -> Tensor:
    """Two arcs of a ring of radius 2, left and right (Rezende & Mohamed 2015, U_1)."""
    ring = ((z.norm(dim=1) - 2) / 0.4) ** 2 / 2
    sides = torch.logaddexp(-(((z[:, 0] - 2) / 0.6) ** 2) / 2, -(((z[:, 0] + 2) / 0.6) ** 2) / 2)
    return sides - ring


def test_two_crescents_are_covered_and_without_repulsion_they_collapse():
    """Both arcs, with the density's own spread along and across them (by quadrature); else only the two peaks."""
    axis = torch.linspace(-5, 5, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    weights = crescents(grid).softmax(0)
    right = weights * (grid[:, 0] > 0) * 2
    centre = right @ grid
    expected = (right @ (grid - centre).square()).sqrt()
    start = 0.5 * normal(40)
    spread = {}
    for repulsion in (True, False):
        found = travel(crescents, start, 800, repulsion=repulsion)
        sides = [found[found[:, 0] < 0], found[found[:, 0] > 0]]
        assert min(map(len, sides)) >= 15
        spread[repulsion] = torch.stack([side.std(0) for side in sides])
    torch.testing.assert_close(spread[True], expected.expand(2, 2), rtol=0.1, atol=0)
    assert bool((spread[False] < expected / 3).all())


def random_theta(count: int = 4, seed: int = 0) -> lora.Theta:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"one.A": (2, 5), "one.B": (3, 2), "two.A": (2, 4), "two.B": (6, 2)}
    return {
        name: torch.randn(count, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def layer(theta: lora.Theta, name: str) -> lora.Theta:
    return {key: value for key, value in theta.items() if key.startswith(name)}


def test_distances_are_the_dense_ones():
    theta = random_theta()
    flat = torch.cat([value.flatten(1) for value in theta.values()], 1)
    np.testing.assert_allclose(
        svgd.distances(list(theta.values())), squareform(pdist(flat.numpy(), "sqeuclidean")), rtol=1e-12, atol=1e-12
    )
    product = (theta["one.B"] @ theta["one.A"]).flatten(1)
    np.testing.assert_allclose(
        svgd.product_distances(layer(theta, "one")), squareform(pdist(product.numpy(), "sqeuclidean")), rtol=1e-12
    )


def test_distances_of_near_particles_far_from_zero():
    """In float32 a plain Gram matrix would leave no digit of these."""
    offset = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1)) * 1e-4
    value = 30 + offset
    expected = squareform(pdist(value.double().numpy(), "sqeuclidean"))
    np.testing.assert_allclose(svgd.distances([value]), expected, rtol=1e-6, atol=1e-12)


def test_the_product_kernel_does_not_see_the_gauge():
    theta = layer(random_theta(), "one")
    m = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 2 * torch.eye(2)
    turned = {"one.A": torch.linalg.inv(m) @ theta["one.A"], "one.B": theta["one.B"] @ m}
    torch.testing.assert_close(svgd.product_distances(turned), svgd.product_distances(theta))
    values = [list(one.values()) for one in (theta, turned)]
    assert not torch.allclose(svgd.distances(values[0]), svgd.distances(values[1]))


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_median_bandwidth(count):
    x = np.random.default_rng(0).normal(size=(count, 3))
    squares = pdist(x, "sqeuclidean")
    expected = float(np.median(squares) / np.log(count))
    assert svgd.bandwidth(torch.tensor(squareform(squares))) == pytest.approx(expected, rel=1e-12)


def test_bandwidth_of_one_particle_or_of_equal_ones_is_finite():
    assert svgd.bandwidth(torch.zeros(1, 1)) == svgd.bandwidth(torch.zeros(3, 3)) == 1.0


def dense_direction(theta: lora.Theta, score: lora.Theta, kernel: Kernel, temperature: float) -> lora.Theta:
    """phi by the formula, pair by pair: the kernel of flat or dense vectors, its gradient by autograd."""
    names = list(theta)
    groups = [names] if kernel == "parameters" else [[n for n in names if n.startswith(g)] for g in ("one", "two")]
    phi = {name: torch.zeros_like(value) for name, value in theta.items()}
    for group in groups:
        particles = unstack({name: theta[name] for name in group})

        def features(particle: lora.Theta) -> Tensor:
            if kernel == "product":
                return next(v for n, v in particle.items() if n[-1] == "B") @ next(
                    v for n, v in particle.items() if n[-1] == "A"
                )
            return torch.cat([value.flatten() for value in particle.values()])

        count = len(particles)
        squares = pdist(np.stack([features(p).flatten().numpy() for p in particles]), "sqeuclidean")
        h = np.median(squares) / np.log(count)
        for i in range(count):
            for j in range(count):
                other = {name: value.clone().requires_grad_() for name, value in particles[j].items()}
                k = torch.exp(-(features(particles[i]) - features(other)).square().sum() / h)
                grads = torch.autograd.grad(k, list(other.values()))
                for name, grad in zip(other, grads, strict=True):
                    phi[name][i] += (k.detach() * score[name][j] / temperature + grad) / count
    return phi


@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_the_direction_is_the_formula(kernel):
    theta, score = random_theta(), random_theta(seed=1)
    expected = dense_direction(theta, score, kernel, 2.5)
    found, _ = direction(theta, score, kernel, 2.5)
    without, _ = direction(theta, score, kernel, 2.5, repulsion=False)
    for name in theta:
        torch.testing.assert_close(found[name], expected[name])
        assert not torch.allclose(found[name], without[name])


def test_the_logged_similarity():
    theta = random_theta()
    _, found = direction(theta, theta, "layer")
    bandwidths, kernels = [], []
    for name in ("one", "two"):
        flat = torch.cat([value.flatten(1) for value in layer(theta, name).values()], 1).numpy()
        squares = pdist(flat, "sqeuclidean")
        bandwidths.append(np.median(squares) / np.log(4))
        kernels.append(np.exp(-squares / bandwidths[-1]).mean())
    assert found.bandwidth == pytest.approx(np.mean(bandwidths)) and found.kernel == pytest.approx(np.mean(kernels))


def trainer(start: list[lora.Theta], origin: lora.Theta, model, **options) -> SvgdTrainer:
    precision = {name: 3.0 * value.shape[1] if name.endswith("A") else 2.0 for name, value in origin.items()}
    return SvgdTrainer(
        model, EXAMPLES, precision, Training(batch_size=4, epochs=3, learning_rate=0.01), origin, **options
    )


def test_one_particle_is_map():
    model = lora.attach(tiny_llama(), rank=2, alpha=4, seed=0)
    origin = lora.get(model)
    precision = {name: 3.0 * value.shape[1] if name.endswith("A") else 2.0 for name, value in origin.items()}
    plain = Trainer(model, EXAMPLES, precision, Training(batch_size=4, epochs=3, learning_rate=0.01))
    while not plain.done:
        plain.run_epoch()
    expected = lora.get(model)
    assert any(float((expected[name] - origin[name]).norm()) > 0.05 for name in origin)
    with stacked(model, stack([origin])):
        run = trainer([origin], origin, model)
        while not run.done:
            run.run_epoch()
        (found,) = unstack(lora.get(model))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_the_prior_is_inside_the_kernel_sum(model, kernel):
    """The gradient that a step of three particles takes, against theirs one by one put through the formula."""
    generator = torch.Generator().manual_seed(6)
    origin = lora.get(model)
    start = [
        {name: value + 0.2 * torch.randn(value.shape, generator=generator).double() for name, value in origin.items()}
        for _ in range(3)
    ]
    batch = collate(EXAMPLES[:4])
    with stacked(model, stack(start)):
        run = trainer(start, origin, model, kernel=kernel)
        for module in run.matrices.values():
            module.weight.requires_grad_(True)
        run.gradient(batch)
        found = {name: -len(EXAMPLES) * module.weight.grad for name, module in run.matrices.items()}
    scores = []
    for theta in start:
        lora.put(model, theta)
        weights = {name: module.weight.requires_grad_() for name, module in lora.matrices(model).items()}
        grads = torch.autograd.grad(log_likelihood(model, batch).mean(), list(weights.values()))
        scores.append(
            {
                name: len(EXAMPLES) * grad - run.precision[name] * (theta[name] - origin[name])
                for name, grad in zip(weights, grads, strict=True)
            }
        )
    expected, _ = direction(stack(start), stack(scores), kernel)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-8)


def test_fit_round_trips_through_peft(run_fit, tiny_base):
    posterior = run_fit(method="svgd", particles=3, rslora=True)
    assert posterior.family == "particles" and posterior.weights == (1 / 3,) * 3
    assert posterior.prior["precision"] == {"all": 10.0}
    assert [set(entry) for entry in posterior.fit["history"]] == [{"nll", "bandwidth", "kernel"}] * 2
    folders = posterior.adapters(3, posterior.path)
    thetas = [lora.read_adapter(folder) for folder in folders]
    assert all(not torch.equal(thetas[0][name], thetas[1][name]) for name in thetas[0])
    best = lora.read_adapter(posterior.map_dir)
    joint = posterior.fit["log_joint"]
    assert posterior.fit["map"] == joint.index(max(joint)) and max(joint) > min(joint)
    assert all(torch.equal(thetas[posterior.fit["map"]][name], best[name]) for name in best)
    tokens = torch.arange(5, 15)[None]
    logits = []
    for folder in folders:
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(folder))
        ours = lora.load_peft(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
        with torch.no_grad():
            logits.append(theirs(tokens).logits)
            assert torch.equal(logits[-1], ours(tokens).logits)
    with torch.no_grad(), stacked(ours, stack(thetas)):
        together = ours(tokens.repeat(3, 1)).logits
    torch.testing.assert_close(together, torch.cat(logits), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-5)


def test_map_is_the_best_particle(model):
    """log p(D|theta_k) and the joint, against each particle by itself."""
    generator = torch.Generator().manual_seed(7)
    origin = lora.get(model)
    start = [
        {name: value + torch.randn(value.shape, generator=generator).double() for name, value in origin.items()}
        for _ in range(3)
    ]
    with stacked(model, stack(start)):
        run = trainer(start, origin, model)
        likelihood, joint = run.log_posterior()
    for index, theta in enumerate(start):
        lora.put(model, theta)
        with torch.no_grad():
            assert float(likelihood[index]) == pytest.approx(float(log_likelihood(model, collate(EXAMPLES)).sum()))
        moved = {name: blockwise.square_distance(theta, origin, [name]) for name in theta}
        prior = -sum(run.precision[name] * moved[name] for name in moved) / 2
        assert float(joint[index] - likelihood[index]) == pytest.approx(prior)


@pytest.mark.parametrize(
    "options", [{"kernel": "parameters"}, {"kernel": "product"}, {"no_repulsion": True}, {"temperature": 0.5}]
)
def test_variants(run_fit, tmp_path, options):
    default = run_fit(tmp_path / "default", method="svgd", particles=2)
    other = run_fit(tmp_path / "other", method="svgd", particles=2, **options)
    first, second = lora.read_adapter(default.map_dir), lora.read_adapter(other.map_dir)
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert default.fit["kernel"] == "layer" and default.fit["repulsion"]
    for key, value in {key.removeprefix("no_"): value for key, value in options.items()}.items():
        assert other.fit[key] == (not value if value is True else value)


def test_text_task(run_fit):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "ok"}]} for n in range(6)
    ]
    assert run_fit(rows=rows, task="text", method="svgd", particles=2).task.kind == "text"


@pytest.mark.parametrize(
    ("where", "epoch"), [("run_epoch", 1), ("log_posterior", 2)]
)  # half way; nothing left to train
def test_an_interrupted_fit_goes_on(run_fit, tmp_path, monkeypatch, capsys, where, epoch):
    options = {"method": "svgd", "particles": 2, "dropout": 0.2}
    whole = run_fit(tmp_path / "whole", **options)
    original = getattr(SvgdTrainer, where)

    def interrupted(self, *args):
        if self.epoch == epoch:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(SvgdTrainer, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit(tmp_path / "cut", **options)
    monkeypatch.setattr(SvgdTrainer, where, original)
    cut = run_fit(tmp_path / "cut", **options)
    assert "resuming from" in capsys.readouterr().out
    first, second = lora.read_adapter(whole.map_dir), lora.read_adapter(cut.map_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert cut.fit["history"] == whole.fit["history"] and cut.fit["log_likelihood"] == whole.fit["log_likelihood"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prior_precision": "evidence"}, "belongs to --method laplace; svgd needs a number"),
        ({"adapter": "/nowhere"}, "--adapter belongs to --method laplace, tfb; svgd"),
        ({"particles": 0}, "--particles is 0"),
        ({"particles": 1001}, "at most 1000"),
        ({"temperature": 0}, "--temperature is 0.0; it must be above 0"),
        ({"temperature": "nan"}, "--temperature is nan; it must be above 0"),
        ({"learning_rate": 1e30}, "at step 1; lower the learning rate"),
    ],
)
def test_bad_input_is_one_sentence(run_fit, options, match):
    with pytest.raises(PosteriorError, match=match) as error:
        run_fit(method="svgd", **{"particles": 2, **options})
    assert "\n" not in str(error.value)


def test_the_record_is_json(run_fit):
    posterior = run_fit(method="svgd", particles=2)
    assert artefact.load(posterior.path).hash == posterior.hash
    assert json.loads((posterior.path / "posterior.json").read_text())["provenance"]["fit"]["method"] == "svgd"
