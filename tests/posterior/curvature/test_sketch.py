"""The sketch of the whole Fisher, and the coupling it gives the blocks, against dense Jacobians and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from posterior.curvature import kfac
from posterior.curvature.sketch import Full, Sketch
from posterior.data.examples import batches, collate
from posterior.laplace import blockwise
from posterior.laplace.linearized import LinearizedModel, moments
from posterior.likelihood.scores import scores
from posterior.models import lora
from posterior.models.base import load_model, resolve
from tests.posterior.conftest import dense_jacobian, make_examples, summed

OPEN = 3.0  # prior precision of B


def fixed(model) -> dict[str, float]:
    """A different prior precision for each A, so that none can be mistaken for another."""
    return {name: 5.0 + index for index, name in enumerate(lora.matrices(model)) if name.endswith(".A")}


def fit(model, examples, size=4, columns=2000) -> tuple[dict[str, kfac.Kronecker], Sketch]:
    sketch = Sketch(lora.matrices(model), fixed(model), columns)
    data = (batch for _, batch in batches(examples, size))
    return kfac.fit(model, lora.matrices(model), data, sketch=sketch), sketch


def precisions(model, precision: float) -> dict[str, float]:
    return dict.fromkeys(lora.matrices(model), precision) | fixed(model)


def fisher(model, examples, precision: float, omega: dict[str, Tensor] | None = None) -> Tensor:
    """Omega^T (whole Fisher whitened by the prior) Omega, without Omega [D, D]; omega: [r, d, m] by matrix."""
    total: Tensor = torch.zeros(1)
    prior = precisions(model, precision)
    for example in examples:
        batch = collate(summed(example))
        p = scores(model, batch)[0].softmax(0)
        parts = {}
        for name, jacobian in dense_jacobian(model, batch).items():
            parts[name] = lora.orient(name, jacobian[0]).flatten(1) * prior[name] ** -0.5
        if omega is None:
            phi = torch.cat(list(parts.values()), 1)
        else:
            phi = torch.stack([part @ omega[name].flatten(0, 1) for name, part in parts.items()]).sum(0)
        total = total + phi.T @ (torch.diag(p) - p[:, None] * p) @ phi
    return total


def gamma(eigenvalues: Tensor) -> float:
    return float((eigenvalues / (1 + eigenvalues)).sum())


@pytest.mark.parametrize("tokens", [1, 2], ids=["single-token", "two-token"])
def test_is_the_dense_fisher_between_the_signs(model, tokens):
    examples = make_examples(5, tokens=tokens)
    _, sketch = fit(model, examples, columns=7)
    omega = {}
    for name, u in sketch.signs.narrow.items():
        w = sketch.signs.wide[lora.orient(name, lora.get(model)[name]).shape[1]]
        omega[name] = (u[:, None] * w).double() * 7**-0.5
    expected = torch.linalg.eigvalsh(fisher(model, examples, OPEN, omega))
    torch.testing.assert_close(sketch.eigenvalues(OPEN), expected.clamp(min=0), rtol=1e-5, atol=1e-6)
    assert sketch.log_determinant(OPEN) == pytest.approx(float(sketch.eigenvalues(OPEN).log1p().sum()), rel=1e-9)


@pytest.mark.parametrize("precision", [0.5, OPEN])
def test_spectrum_tends_to_the_exact_one(model, precision):
    """2000 columns: effective dimension and log-determinant of the dense Fisher within 2 %."""
    examples = make_examples(6)
    exact = torch.linalg.eigvalsh(fisher(model, examples, precision)).clamp(min=0)
    found = fit(model, examples)[1].eigenvalues(precision)
    assert gamma(found) == pytest.approx(gamma(exact), rel=0.02)
    assert float(found.log1p().sum()) == pytest.approx(float(exact.log1p().sum()), rel=0.02)


@pytest.mark.parametrize("tokens", [1, 2])
def test_batch_size_does_not_matter(model, tokens):
    """Trap 4, for the sketch: 1, 4 and 16 agree to 1e-5."""
    examples = make_examples(17, tokens=tokens)
    reference = fit(model, examples, 16, columns=50)[1].gram
    for size in (1, 4):
        torch.testing.assert_close(fit(model, examples, size, columns=50)[1].gram, reference, rtol=1e-5, atol=1e-8)


# The covariance of scores


def prior_covariance(model, batch, precision: float) -> Tensor:
    """J P_0^-1 J^T [B, C-1, C-1] of the differences to the first candidate."""
    return dense_covariance(model, batch, precision, [])


def dense_covariance(model, batch, precision: float, data) -> Tensor:
    """J P^-1 J^T with the whole Fisher of the data, by dense linear algebra of all parameters together."""
    prior = precisions(model, precision)
    parts = [
        lora.orient(name, jacobian).flatten(2) * prior[name] ** -0.5
        for name, jacobian in dense_jacobian(model, batch).items()
    ]
    j = torch.cat(parts, 2)
    j = j[:, 1:] - j[:, :1]
    p = torch.eye(j.shape[2], dtype=j.dtype) + (fisher(model, data, precision) if data else 0)
    return j @ torch.linalg.inv(p) @ j.mT


@pytest.mark.parametrize("tokens", [1, 2], ids=["single-token", "two-token"])
@pytest.mark.parametrize("precision", [0.5, OPEN])
def test_covariance_tends_to_the_exact_one(model, tokens, precision):
    """1500 columns, against dense linear algebra of all parameters: within 5 %, on rows of the data and others."""
    data, asked = make_examples(9, tokens=tokens)[:6], make_examples(9, tokens=tokens)[3:]
    full = fit(model, data, columns=1500)[1].full(precision)
    _, found = moments(model, lora.matrices(model), full, collate(asked), (1.0, 4.0))
    exact = dense_covariance(model, collate(asked), precision, data)
    assert float((found[0, :, 1:, 1:] - exact).norm() / exact.norm()) < 0.05
    before = prior_covariance(model, collate(asked), precision)
    assert float(exact[:3].norm() / before[:3].norm()) < 0.5
    again = moments(model, lora.matrices(model), full.rescaled(4.0), collate(asked))[1]
    torch.testing.assert_close(found[1:], again)


def test_covariance_without_data_is_the_prior_s(model):
    """However few the columns, as the prior's part is not sketched; also where two candidates are the same."""
    examples = make_examples(3)
    doubled = (replace(e, continuations=(e.continuations[0], *2 * e.continuations[1:2])) for e in examples)
    twins = summed(*doubled)
    _, sketch = fit(model, examples, columns=9)
    sketch.gram.zero_()
    for rows in (examples, twins):
        _, (found,) = moments(model, lora.matrices(model), sketch.full(OPEN), collate(rows))
        expected = prior_covariance(model, collate(rows), OPEN)
        torch.testing.assert_close(found[:, 1:, 1:], expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


def test_the_folder_keeps_the_covariance(run_fit, tiny_base):
    posterior = run_fit(structure="full")
    assert isinstance(posterior.covariance, Full) and posterior.covariance.precision == posterior.precision
    model = lora.load_peft(load_model(resolve(str(tiny_base)), torch.float32, "cpu"), posterior.map_dir).eval()
    model.requires_grad_(False)
    (example,) = make_examples(1)
    _, (found,) = moments(model, lora.matrices(model), posterior.covariance, collate(summed(example)))
    (served,) = LinearizedModel(resolve(str(tiny_base)), {"tiny": posterior}).logits(
        "tiny", [example.prompt], [example.continuations]
    )
    torch.testing.assert_close(served[1], found[0])
    blocks = run_fit(posterior.path.parent / "blocks")
    assert isinstance(blocks.covariance, blockwise.Blocks)


def block(v: float, small: int = 2, large: int = 5) -> kfac.Kronecker:
    """A block with one eigenvalue v and zeros."""
    values = [torch.zeros(width, dtype=torch.float64) for width in (small, large)]
    values[0][0], values[1][0] = v, 1.0
    return kfac.Kronecker(*(kfac.Factor(torch.eye(len(each)).double(), each, 0.0) for each in values))


@pytest.mark.parametrize("blocks", [1, 3, 50])
def test_one_datum_and_equal_blocks(blocks):
    """B blocks of gradient norm^2 v: the whole Fisher is B v, c = B, and the score's variance B v / (lambda + B v)."""
    v, precision = 0.7, 2.0
    curvature = {f"{index}.B": block(v) for index in range(blocks)}
    common = dict.fromkeys(curvature, precision)
    c = blockwise.coupling(curvature, common, torch.tensor([blocks * v / precision], dtype=torch.float64))
    assert c == pytest.approx(blocks, rel=1e-9)
    jacobian = torch.zeros(1, 1, 2, 5, dtype=torch.float64)
    jacobian[..., 0, 0] = math.sqrt(v)
    variance = sum(
        blockwise.quadratic(each, [precision], jacobian) for each in blockwise.coupled(curvature, c).values()
    )
    assert float(variance) == pytest.approx(blocks * v / (precision + blocks * v), rel=1e-9)


def test_coupled_blocks_have_the_effective_dimension_of_the_whole(model):
    curvature, sketch = fit(model, make_examples(8))
    prior = precisions(model, OPEN)
    c = blockwise.coupling(curvature, prior, sketch.eigenvalues(OPEN))
    total = sum(
        blockwise.effective_dimension(each, prior[name]) for name, each in blockwise.coupled(curvature, c).items()
    )
    assert c > 1 and total / c == pytest.approx(gamma(sketch.eigenvalues(OPEN)), rel=1e-8)


def test_blocks_that_count_too_little_are_left_alone():
    assert blockwise.coupling({"0.B": block(1.0)}, {"0.B": 1.0}, torch.tensor([5.0])) == 1.0
    assert blockwise.coupling({"0.B": block(0.0)}, {"0.B": 1.0}, torch.zeros(3)) == 1.0


def test_evidence_is_that_of_the_whole_fisher(model):
    """Against the dense log-determinant: the prior precision of B within 2 % (by blocks alone it is 39 % too large).

    The evidence there, whose log-determinant is the coupled blocks', is within 0.1 nat.
    """
    examples = make_examples(8)
    curvature, sketch = fit(model, examples)
    distance = dict.fromkeys(curvature, 0.2)

    def loss(log_precision: float) -> float:
        prior = precisions(model, math.exp(log_precision))
        eigenvalues = torch.linalg.eigvalsh(fisher(model, examples, math.exp(log_precision))).clamp(min=0)
        return sum(prior[name] * distance[name] for name in prior) + float(eigenvalues.log1p().sum())

    exact = minimize_scalar(loss, bounds=(-3, 6), method="bounded")
    prior, c = blockwise.settle(curvature, sketch, distance, "scalar", fixed(model))
    (opened,) = {value for name, value in prior.items() if name.endswith(".B")}
    assert opened == pytest.approx(math.exp(exact.x), rel=0.02)
    evidence = blockwise.evidence(blockwise.coupled(curvature, c), distance, prior, 0.0, c)
    assert evidence == pytest.approx(-exact.fun / 2, abs=0.1)


def test_layers_may_differ(model):
    """One prior precision for each B: the coupling is that of the best common one."""
    curvature, sketch = fit(model, make_examples(8), columns=50)
    distance = {name: 0.1 + index for index, name in enumerate(curvature)}
    common, c = blockwise.settle(curvature, sketch, distance, "scalar", fixed(model))
    layers, again = blockwise.settle(curvature, sketch, distance, "layer", fixed(model))
    assert c == again and len(set(common.values())) < len(set(layers.values())) == len(layers)
