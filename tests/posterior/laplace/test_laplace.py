"""Evidence, samples and the linearised predictive against dense linear algebra, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from posterior.curvature import kfac
from posterior.data.examples import batches, collate
from posterior.errors import PosteriorError
from posterior.laplace import blockwise
from posterior.laplace.linearized import moments
from posterior.likelihood.scores import scores
from posterior.models import lora
from tests.posterior.conftest import dense_jacobian, make_examples
from tests.posterior.curvature.test_kfac import dense

LAMBDAS = [0.5, 3.0, 20.0]


@pytest.fixture(params=[None, 3], ids=["whole", "rank 3"])
def curvature(model, request):
    examples = make_examples(8)
    return kfac.fit(model, lora.matrices(model), (b for _, b in batches(examples, 4)), rank=request.param)


def precision_of(curvature) -> dict[str, float]:
    """A different prior precision for each matrix, so that none can be mistaken for another."""
    return {name: 0.5 + index for index, name in enumerate(curvature)}


def test_evidence_is_the_dense_one(curvature):
    """Trap 3: signs, squares, and the prior's log-determinant counted once per matrix."""
    precision = precision_of(curvature)
    distance = {name: 0.1 * index for index, name in enumerate(curvature)}
    value = -7.0
    for name, block in curvature.items():
        p = dense(block) + precision[name] * torch.eye(math.prod(block.shape)).double()
        value += -precision[name] / 2 * distance[name]
        value -= (float(torch.logdet(p)) - len(p) * math.log(precision[name])) / 2
    assert blockwise.evidence(curvature, distance, precision, -7.0) == pytest.approx(value, rel=1e-9)


def test_effective_dimension_is_the_dense_one(curvature):
    for block in curvature.values():
        h = dense(block)
        gamma = float(torch.trace(h @ torch.linalg.inv(h + 2.0 * torch.eye(len(h)).double())))
        assert blockwise.effective_dimension(block, 2.0) == pytest.approx(gamma, rel=1e-8)


@pytest.mark.parametrize("grouping", ["scalar", "side", "layer"])
def test_optimal_precision_is_mackays_fixed_point(curvature, grouping):
    distance = dict.fromkeys(curvature, 0.05)
    best = blockwise.optimal_precision(curvature, distance, grouping)
    for names in blockwise.groups(list(curvature), grouping).values():
        gamma = sum(blockwise.effective_dimension(curvature[name], best[name]) for name in names)
        assert best[names[0]] == pytest.approx(gamma / sum(distance[name] for name in names), rel=1e-4)
        assert len({best[name] for name in names}) == 1


def test_optimal_precision_beats_its_neighbours(curvature):
    distance = dict.fromkeys(curvature, 0.05)
    best = blockwise.optimal_precision(curvature, distance, "scalar")
    top = blockwise.evidence(curvature, distance, best, 0.0)
    for factor in (0.9, 1.1):
        assert blockwise.evidence(curvature, distance, {n: v * factor for n, v in best.items()}, 0.0) < top


@pytest.mark.parametrize("span", [3, 32])
def test_samples_have_the_posterior_covariance_in_the_leading_directions(curvature, span, monkeypatch):
    """20,000 draws of one matrix; each covariance entry within 5 standard errors of Q P^-1 Q, Q the projection."""
    monkeypatch.setattr(blockwise, "SPAN", span)
    name = next(iter(curvature))
    block = {name: curvature[name]}
    mean = {name: torch.zeros(block[name].shape, dtype=torch.float64)}
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([blockwise.sample(block, {name: 2.0}, mean, generator)[name].flatten() for _ in range(20_000)])
    large = block[name].large
    basis = large.basis.double()[:, large.values.topk(min(span, len(large.values))).indices]
    project = torch.kron(torch.eye(block[name].shape[0]).double(), basis @ basis.T)
    covariance = project @ torch.linalg.inv(dense(block[name]) + 2.0 * torch.eye(draws.shape[1]).double()) @ project
    error = (covariance.diagonal()[:, None] * covariance.diagonal() + covariance.square()).sqrt() / math.sqrt(
        len(draws)
    )
    assert bool(((draws.T @ draws / len(draws) - covariance).abs() < 5 * error + 1e-12).all())
    assert bool((draws.mean(0).abs() < 5 * (covariance.diagonal() / len(draws)).sqrt() + 1e-9).all())


def test_same_seed_same_sample(curvature, model):
    mean = lora.get(model)
    first, second = (
        blockwise.sample(curvature, precision_of(curvature), mean, torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in mean)


@pytest.mark.parametrize("tokens", [1, 2], ids=["single-token", "two-token"])
def test_linearized_covariance_is_j_inverse_p_j(model, curvature, tokens):
    """Against torch.func Jacobians and dense inverses, to 3e-6 relative; several prior precisions in one pass."""
    batch = collate(make_examples(5, tokens=tokens))
    law = blockwise.Blocks(curvature, precision_of(curvature))
    precisions = [{name: value * scale for name, value in law.precision.items()} for scale in LAMBDAS]
    mean, covariance = moments(model, lora.matrices(model), law, batch, LAMBDAS)
    torch.testing.assert_close(mean, scores(model, batch).detach())
    jacobians = dense_jacobian(model, batch)
    for number, precision in enumerate(precisions):
        expected = torch.zeros(5, 3, 3, dtype=torch.float64)
        for name, block in curvature.items():
            j = lora.orient(name, jacobians[name]).flatten(2)
            j = j - j[:, :1]  # relative to the first candidate
            inverse = torch.linalg.inv(dense(block) + precision[name] * torch.eye(math.prod(block.shape)).double())
            expected += j @ inverse @ j.mT
        torch.testing.assert_close(covariance[number], expected, rtol=3e-6, atol=1e-12)


def test_parts_that_do_not_fit_are_refused(model, curvature):
    mean, precision = lora.get(model), precision_of(curvature)
    name = next(iter(curvature))
    with pytest.raises(PosteriorError, match="do not cover"):
        blockwise.check({k: v for k, v in curvature.items() if k != name}, precision, mean)
    with pytest.raises(PosteriorError, match="shape"):
        blockwise.check(curvature, precision, mean | {name: mean[name][:, :-1]})
    with pytest.raises(PosteriorError, match="positive"):
        blockwise.check(curvature, precision | {name: 0.0}, mean)
