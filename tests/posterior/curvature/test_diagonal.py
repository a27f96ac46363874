"""`--structure diagonal` against dense Jacobians and dense inverses of a tiny model, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from posterior.curvature.diagonal import Diagonal
from posterior.curvature.sketch import Sketch
from posterior.data.examples import collate
from posterior.errors import PosteriorError
from posterior.laplace import blockwise
from posterior.laplace.linearized import LinearizedModel, moments
from posterior.models import lora
from posterior.models.base import resolve
from posterior.storage import packing
from tests.posterior.conftest import dense_jacobian, make_examples
from tests.posterior.curvature.test_kfac import exact_blocks, fit


@pytest.fixture
def curvature(model) -> dict[str, Diagonal]:
    return fit(model, make_examples(8), structure="diagonal")


def dense(block: Diagonal) -> torch.Tensor:
    return block.values.flatten().diag()


def precision_of(curvature) -> dict[str, float]:
    return {name: 0.5 + index for index, name in enumerate(curvature)}


@pytest.mark.parametrize("tokens", [1, 2])
def test_is_the_diagonal_of_the_exact_block(model, tokens):
    """To 1e-6 relative, with examples of several positions, where KFAC is an approximation."""
    examples = make_examples(6, tokens=tokens)
    blocks = fit(model, examples, structure="diagonal")
    for name, exact in exact_blocks(model, examples).items():
        assert blocks[name].shape == tuple(lora.orient(name, lora.get(model)[name]).shape)
        torch.testing.assert_close(blocks[name].values.flatten(), exact.diagonal(), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("tokens", [1, 2])
def test_batch_size_does_not_matter(model, tokens):
    """Trap 4, for the diagonal: 1, 4 and 16 agree to 1e-5."""
    examples = make_examples(17, tokens=tokens)
    reference = fit(model, examples, size=16, structure="diagonal")
    for size in (1, 4):
        for name, block in fit(model, examples, size=size, structure="diagonal").items():
            torch.testing.assert_close(block.values, reference[name].values, rtol=1e-5, atol=1e-10)


def test_evidence_and_effective_dimension_are_the_dense_ones(curvature):
    precision, distance = precision_of(curvature), dict.fromkeys(curvature, 0.3)
    value, gamma = -7.0, 0.0
    for name, block in curvature.items():
        p = dense(block) + precision[name] * torch.eye(math.prod(block.shape)).double()
        value -= precision[name] / 2 * 0.3 + (float(torch.logdet(p)) - len(p) * math.log(precision[name])) / 2
        gamma += float(torch.trace(dense(block) @ torch.linalg.inv(p)))
    assert blockwise.evidence(curvature, distance, precision, -7.0) == pytest.approx(value, rel=1e-9)
    found = sum(blockwise.effective_dimension(block, precision[name]) for name, block in curvature.items())
    assert found == pytest.approx(gamma, rel=1e-8)


def test_linearized_covariance_is_j_inverse_p_j(model, curvature):
    batch, precision = collate(make_examples(5)), precision_of(curvature)
    _, (covariance,) = moments(model, lora.matrices(model), blockwise.Blocks(curvature, precision), batch)
    expected = torch.zeros(5, 3, 3, dtype=torch.float64)
    for name, jacobian in dense_jacobian(model, batch).items():
        j = lora.orient(name, jacobian).flatten(2)
        j = j - j[:, :1]
        inverse = torch.linalg.inv(dense(curvature[name]) + precision[name] * torch.eye(j.shape[2]).double())
        expected += j @ inverse @ j.mT
    torch.testing.assert_close(covariance, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("span", [3, 32])
def test_samples_have_the_posterior_variances_in_the_leading_columns(curvature, span, monkeypatch):
    """20,000 draws of a B: variances 1 / (lambda + H) within 5 standard errors where they move, zero elsewhere."""
    monkeypatch.setattr(blockwise, "SPAN", span)
    name = next(name for name in curvature if name.endswith(".B"))
    block, mean = {name: curvature[name]}, {name: torch.zeros(curvature[name].shape[::-1], dtype=torch.float64)}
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([blockwise.sample(block, {name: 2.0}, mean, generator)[name] for _ in range(20_000)])
    values = curvature[name].values.T  # [out, r]
    moving = torch.zeros(len(values)).bool()
    moving[values.sum(1).topk(min(span, len(values))).indices] = True
    variance = (1 / (2.0 + values)) * moving[:, None]
    error = variance * (2 / len(draws)) ** 0.5
    assert bool(((draws.square().mean(0) - variance).abs() <= 5 * error).all())
    cross = draws[:, moving].flatten(1).T.corrcoef() - torch.eye(int(moving.sum()) * values.shape[1])
    assert float(cross.abs().max()) < 5 / len(draws) ** 0.5


def test_coupled_blocks_have_the_effective_dimension_of_the_whole(model):
    sketch = Sketch(lora.matrices(model), {}, 200)
    curvature = fit(model, make_examples(8), structure="diagonal", sketch=sketch)
    eigenvalues, prior = sketch.eigenvalues(3.0), dict.fromkeys(curvature, 3.0)
    c = blockwise.coupling(curvature, prior, eigenvalues)
    total = sum(
        blockwise.effective_dimension(each, prior[name]) for name, each in blockwise.coupled(curvature, c).items()
    )
    assert c > 1 and total / c == pytest.approx(float((eigenvalues / (1 + eigenvalues)).sum()), rel=1e-8)


def test_round_trip(curvature, tmp_path):
    from safetensors.torch import save_file

    save_file(packing.pack(curvature, precision_of(curvature)), tmp_path / "laplace.safetensors")
    found, precision = packing.unpack(tmp_path / "laplace.safetensors")
    assert precision == precision_of(curvature)
    assert all(torch.equal(found[name].values, block.values) for name, block in curvature.items())


def test_fit_and_serve(run_fit, tiny_base, tmp_path):
    posterior = run_fit(structure="diagonal")
    assert posterior.fit["method"] == "laplace-diagonal" and "sharing" not in posterior.fit
    assert posterior.fit["coupling"] > 1 and 0 < posterior.fit["effective_dimension"] < 12
    mean, covariance = LinearizedModel(resolve(str(tiny_base)), {"tiny": posterior}).logits(
        "tiny", [[5, 6, 7]], [((20,), (21,))]
    )[0]
    assert mean.shape == (2,) and float(covariance[1, 1]) > 0
    first, second = (lora.read_adapter(folder) for folder in posterior.adapters(2, tmp_path))
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_options_of_kfac_are_refused(run_fit):
    with pytest.raises(PosteriorError, match="--sharing belongs to --structure full or kfac"):
        run_fit(structure="diagonal", sharing="reduce")


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_a_diverged_adapter_is_refused(model, structure):
    lora.put(model, {name: torch.full_like(value, float("nan")) for name, value in lora.get(model).items()})
    with pytest.raises(PosteriorError, match="scores are not finite: the adapter has diverged"):
        fit(model, make_examples(2), structure=structure)
