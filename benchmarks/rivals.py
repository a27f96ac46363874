"""Laplace of one adapter on the same rows, batches and prior: ours, laplace-torch's and bayesian-lora's, and the dense
answer.

A way fits the curvature once (`fit`) and then gives the posterior variance of the scores' differences to the first
candidate's (`variance`). The prior is N(theta_0, I / lambda) with one lambda for all matrices, as bayesian-lora knows
no other; nobody is asked to choose it. laplace-torch and bayesian-lora are used as their documents say, with the
cheapest settings that these allow: only the last position's logits are formed, and batches are of like length.

The dense answer is J P^-1 J^T with P = lambda I + Phi^T Phi of all parameters together, nothing left out, by
Woodbury's identity: Phi has N (C - 1) rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from posterior.curvature import kfac
from posterior.curvature.sketch import Sketch
from posterior.data.examples import Batch
from posterior.laplace import blockwise
from posterior.laplace.linearized import moments
from posterior.likelihood.scores import record, scores
from posterior.models import lora

KFAC_RANK = 10  # bayesian-lora's default
WIDE = 100  # its threshold of a wide side
Batches = Sequence[Batch]


class Way(Protocol):
    def fit(self, batches: Batches) -> None: ...

    def variance(self, batch: Batch) -> Tensor:
        """[B, C - 1] of the scores relative to the first candidate's."""
        ...


@dataclass
class Ours:
    """What `posterior fit` measures in one pass: Kronecker factors of rank 32, and a sketch of the whole Fisher."""

    model: Any
    precision: float
    structure: kfac.Structure = "kfac"

    def fit(self, batches: Batches) -> None:
        matrices = lora.matrices(self.model)
        self.model.eval().requires_grad_(False)
        sketch = Sketch(matrices, {})
        blocks = kfac.fit(self.model, matrices, batches, rank=32, sketch=sketch)
        lambdas = dict.fromkeys(blocks, self.precision)
        c = blockwise.coupling(blocks, lambdas, sketch.eigenvalues(self.precision))
        by_blocks = blockwise.Blocks(blockwise.coupled(blocks, c), lambdas)
        self.covariance: blockwise.Covariance = sketch.full(self.precision) if self.structure == "full" else by_blocks

    def variance(self, batch: Batch) -> Tensor:
        matrices = lora.matrices(self.model)
        _, (covariance,) = moments(self.model, matrices, self.covariance, batch)
        return covariance.diagonal(dim1=1, dim2=2)[:, 1:]


@dataclass
class LaplaceTorch:
    """laplace-torch: Kronecker factors by curvlinops, the exact Fisher of a classifier."""

    model: Any
    precision: float

    def fit(self, batches: Batches) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from laplace import Laplace
            from laplace.curvature import CurvlinopsGGN

            only_lora(self.model)
            self.laplace = Laplace(
                Classifier(self.model),
                "classification",
                subset_of_weights="all",
                hessian_structure="kron",
                backend=CurvlinopsGGN,
                prior_precision=self.precision,
            )
            with sdpa_kernel(SDPBackend.MATH):
                self.laplace.fit(Loader(batches))

    def variance(self, batch: Batch) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            _, covariance = self.laplace._glm_predictive_distribution(vars(batch))
        return relative(covariance.detach().double())


@dataclass
class BayesianLora:
    """bayesian-lora, the code of the Laplace-LoRA paper (arXiv 2308.13111): one sampled label, the last position."""

    model: Any
    precision: float

    def fit(self, batches: Batches) -> None:
        from bayesian_lora.kfac import calculate_kronecker_factors
        from bayesian_lora.main import cholesky_decompose_small_factors

        only_lora(self.model)
        torch.manual_seed(0)
        factors = calculate_kronecker_factors(
            self.model, scores, batches, KFAC_RANK, WIDE, [f"lora_{side}.{lora.ADAPTER}" for side in "AB"]
        )
        self.model.eval()
        device = str(next(self.model.parameters()).device)
        self.factors = cholesky_decompose_small_factors(factors, WIDE, device, torch.float32)

    def variance(self, batch: Batch) -> Tensor:
        from bayesian_lora.main import jacobian_mean, variance

        rank = min(next(iter(lora.matrices(self.model).values())).weight.shape)
        with sdpa_kernel(SDPBackend.MATH):
            jacobian, _ = jacobian_mean(
                Classifier(self.model), {"data": vars(batch)}, output_callback=lambda scores: scores
            )
        covariance = variance(
            Inputs(batch.tokens),
            jacobian,
            self.factors,
            torch.tensor(1 / self.precision),
            batch.answer.shape[1],
            rank,
            KFAC_RANK,
            str(batch.tokens.device),
        )
        return relative(covariance.detach().double())


WAYS: dict[str, Callable[[Any, float], Way]] = {
    "ours, full": partial(Ours, structure="full"),
    "ours, kfac": Ours,
    "laplace-torch": LaplaceTorch,
    "bayesian-lora": BayesianLora,
}


def dense(model: Any, precision: float, rows: Batches, asked: Batches) -> list[Tensor]:
    """The exact variances [B, C - 1] of each batch that is asked for, in float64."""
    empty = torch.zeros(0, sum(module.weight.numel() for module in lora.matrices(model).values()))
    phi = torch.cat([empty, *(jacobian(model, batch, root=True).cpu() for batch in rows)]).double()
    gram = torch.eye(len(phi), dtype=torch.float64) + phi @ phi.T / precision
    found = []
    for batch in asked:
        j = jacobian(model, batch).cpu().double()
        cross = j @ phi.T / precision
        value = j.square().sum(1) / precision - (cross * torch.linalg.solve(gram, cross.T).T).sum(1)
        found.append(value.view(len(batch.label), -1))
    return found


def jacobian(model: Any, batch: Batch, root: bool = False) -> Tensor:
    """[B (C - 1), D] over all LoRA parameters: of the score differences, or times a root of the Fisher."""
    return torch.cat([value.flatten(1) for value in gradients(model, batch, root).values()], 1)


def gradients(model: Any, batch: Batch, root: bool = False) -> dict[str, Tensor]:
    """The same by matrix, [B (C - 1), r, d] as lora.orient has it."""
    model.eval().requires_grad_(False)
    matrices = lora.matrices(model)
    found: dict[str, list[Tensor]] = {name: [] for name in matrices}
    with record(matrices) as tape:
        f = scores(model, batch)
        rows, width = f.shape
        if root:
            columns = kfac.fisher_columns(f.detach()[:, None])
        else:
            columns = torch.cat([-torch.ones(1, width - 1), torch.eye(width - 1)]).expand(rows, -1, -1).to(f)
        for c in range(columns.shape[2]):
            for name, g in tape.gradients(f, columns[:, :, c], keep=c + 1 < columns.shape[2]).items():
                a = tape.inputs[name] * batch.mask[..., None]
                found[name].append(lora.orient(name, g.mT @ a.to(g)))
    return {name: torch.stack(parts, 1).flatten(0, 1) for name, parts in found.items()}


def only_lora(model: Any) -> None:
    """Both libraries take the parameters that need a gradient."""
    model.eval().requires_grad_(False)
    for module in lora.matrices(model).values():
        module.weight.requires_grad_(True)


def relative(covariance: Tensor) -> Tensor:
    """Variances [B, C - 1] of the differences to the first candidate, from a covariance [B, C, C] of scores."""
    difference = covariance - covariance[:, :1]
    difference = difference - difference[:, :, :1]
    return difference.diagonal(dim1=1, dim2=2)[:, 1:]


class Classifier(nn.Module):
    """A batch's fields -> scores [B, C]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, data: dict[str, Any]) -> Tensor:
        return scores(self.model, Batch(**{name: data[name] for name in Batch.__dataclass_fields__}))


class Loader:
    """What laplace-torch needs of a DataLoader: batches as mappings, and a `dataset` with a length."""

    def __init__(self, batches: Batches):
        self.batches = batches
        self.dataset = range(sum(len(batch.label) for batch in batches))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({**vars(batch), "input_ids": batch.tokens, "labels": batch.label} for batch in self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass
class Inputs:
    """bayesian-lora asks for its inputs' size only."""

    input_ids: Tensor
