"""laplace-torch as an independent oracle where Kronecker factors are exact: one matrix, one example, one position.

`make oracles` runs this folder; pytest does not find its files by their names.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from posterior.curvature import kfac
from posterior.data.examples import collate
from posterior.laplace import blockwise
from posterior.laplace.linearized import moments
from posterior.likelihood.scores import log_likelihood, scores
from posterior.models import lora
from tests.posterior.conftest import make_examples

with warnings.catch_warnings():  # its back ends use deprecated parts of torch when imported
    warnings.simplefilter("ignore")
    from laplace import Laplace
    from laplace.curvature import CurvlinopsGGN

LAMBDA = 3.0


class Choice(nn.Module):
    """token id [B, 1] -> scores of the candidates [B, C]; only one LoRA matrix is a parameter."""

    def __init__(self, inner: nn.Module, batch, weight: nn.Parameter):
        super().__init__()
        self.inner, self.batch = inner, batch
        weight.requires_grad_(True)

    def forward(self, tokens: Tensor) -> Tensor:
        assert torch.equal(tokens, self.batch.tokens)
        with sdpa_kernel(SDPBackend.MATH):  # curvlinops needs forward-mode derivatives, which the fused kernels lack
            return scores(self.inner, self.batch)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj.A", "model.layers.1.self_attn.v_proj.B"])
@pytest.mark.filterwarnings("ignore")  # of laplace-torch and its back ends
def test_curvature_evidence_and_functional_variance_agree(model, name):
    batch = collate(make_examples(1, length=(1, 2)))
    matrices = {name: lora.matrices(model)[name]}
    block = kfac.fit(model, matrices, [batch])
    moved = blockwise.square_distance(lora.get(model), {name: torch.zeros_like(matrices[name].weight)}, [name])
    ours = blockwise.evidence(block, {name: moved}, {name: LAMBDA}, float(log_likelihood(model, batch)))
    mean, (covariance,) = moments(model, matrices, blockwise.Blocks(block, {name: LAMBDA}), batch)

    oracle = Laplace(
        Choice(model, batch, matrices[name].weight),
        "classification",
        subset_of_weights="all",
        hessian_structure="full",
        backend=CurvlinopsGGN,
        prior_precision=LAMBDA,
    )
    oracle.fit(DataLoader(TensorDataset(batch.tokens, batch.label), batch_size=1))
    assert float(oracle.log_marginal_likelihood()) == pytest.approx(ours, rel=1e-5)
    f, variance = oracle._glm_predictive_distribution(batch.tokens)
    torch.testing.assert_close(f.detach().double(), mean, rtol=1e-5, atol=1e-6)
    difference = variance.detach().double()
    difference = difference - difference[:, :1]  # relative to the first candidate, as ours
    difference = difference - difference[:, :, :1]
    torch.testing.assert_close(difference, covariance, rtol=1e-4, atol=1e-8)
