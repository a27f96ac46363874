"""Laplace: theta ~ N(theta*, P^-1), P = lambda I + H block by block, H from Kronecker factors (Laplace-LoRA, arXiv
2308.13111).

The prior is N(theta_0, I / lambda) with theta_0 the initialisation (A random, B zero), not zero: the random A is
evidence of
nothing. A group is a set of matrices that share one lambda. The evidence of a group is, up to a constant,
    log p(D|theta*) - (lambda/2) |theta* - theta_0|^2 - (1/2) [logdet P - D log lambda],
separable over groups; its stationary point is MacKay's lambda = gamma / |theta* - theta_0|^2, gamma = sum v / (v +
lambda).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from posterior.errors import PosteriorError
from posterior.kfac import Kronecker
from posterior.lora import Theta

Grouping = Literal["scalar", "side", "layer"]
Curvature = Mapping[str, Kronecker]
Precision = dict[str, float]
LOG_BOUNDS = (math.log(1e-4), math.log(1e8))


def groups(names: list[str], grouping: Grouping) -> dict[str, list[str]]:
    """Which matrices share a prior precision: all ("scalar"), all A and all B ("side"), or each A,B pair ("layer")."""
    found: dict[str, list[str]] = {}
    for name in names:
        key = "all" if grouping == "scalar" else name[-1] if grouping == "side" else name[:-2]
        found.setdefault(key, []).append(name)
    return found


def logdet_ratio(block: Kronecker, precision: float) -> float:
    """logdet P - D log lambda = sum log(1 + v / lambda) of one matrix."""
    kept, rest, multiplicity = block.eigenvalues()
    total = torch.log1p(kept.double() / precision).sum() + multiplicity * torch.log1p(rest.double() / precision).sum()
    return float(total)


def effective_dimension(block: Kronecker, precision: float) -> float:
    """gamma = sum v / (v + lambda): how many of the matrix's parameters the data determine."""
    kept, rest, multiplicity = block.eigenvalues()
    kept, rest = kept.double(), rest.double()
    return float((kept / (kept + precision)).sum() + multiplicity * (rest / (rest + precision)).sum())


def square_distance(theta: Theta, origin: Theta, names: list[str]) -> float:
    """|theta - theta_0|^2 over the named matrices."""
    return sum(float((theta[name].double() - origin[name].double()).square().sum()) for name in names)


def evidence(
    curvature: Curvature, distance: Mapping[str, float], precision: Mapping[str, float], log_likelihood: float
) -> float:
    """log p(D) in nats. distance and precision by matrix name: |theta* - theta_0|^2 and lambda of each."""
    penalty = sum(
        precision[name] * distance[name] + logdet_ratio(block, precision[name]) for name, block in curvature.items()
    )
    return log_likelihood - penalty / 2


def initial_precision(name: str, matrix: Tensor) -> float | None:
    """The precision of A's initialisation, 3 d_in (Kaiming-uniform, variance 1 / (3 d_in)); None for B, which starts
    at zero."""
    return 3.0 * matrix.shape[1] if name.endswith(".A") else None


def optimal_precision(
    curvature: Curvature, distance: Mapping[str, float], grouping: Grouping, fixed: Mapping[str, float] | None = None
) -> Precision:
    """The prior precision of each matrix that maximises the evidence, group by group, to convergence in log lambda.

    The matrices in `fixed` keep the precision given there.
    """
    best: Precision = dict(fixed or {})
    for names in groups([name for name in curvature if name not in best], grouping).values():
        moved = sum(distance[name] for name in names)

        def loss(log_lambda: float, names: list[str] = names, moved: float = moved) -> float:
            precision = math.exp(log_lambda)
            return precision * moved + sum(logdet_ratio(curvature[name], precision) for name in names)

        found = minimize_scalar(loss, bounds=LOG_BOUNDS, method="bounded", options={"xatol": 1e-6})
        best.update(dict.fromkeys(names, math.exp(float(found.x))))
    return best


def sample(curvature: Curvature, precision: Mapping[str, float], mean: Theta, generator: torch.Generator) -> Theta:
    """One draw theta* + P^{-1/2} eps, matrix by matrix in the factors' eigenbasis. Drawn on the CPU: the seed fixes
    it anywhere."""
    return {
        name: mean[name] + unorient(name, _draw(block, precision[name], generator)).to(mean[name])
        for name, block in curvature.items()
    }


def _draw(block: Kronecker, precision: float, generator: torch.Generator) -> Tensor:
    kept, rest, multiplicity = block.eigenvalues()
    kept, rest = kept.double().cpu(), rest.double().cpu()
    small, large = block.small.basis.double().cpu(), block.large.basis.double().cpu()
    noise = torch.randn(block.shape, generator=generator, dtype=torch.float64)
    inside = noise @ large
    out = (inside * (precision + kept).rsqrt()) @ large.T
    if multiplicity:
        out = out + (noise - inside @ large.T) * (precision + rest).rsqrt()[:, None]
    return small @ out


def quadratic(block: Kronecker, precisions: Sequence[float], jacobian: Tensor) -> Tensor:
    """J P^-1 J^T [M, N, C, C] of one matrix for M prior precisions; jacobian [N, C, r, d] oriented like the block
    (see `orient`)."""
    kept, rest, multiplicity = block.eigenvalues()
    rotated = torch.einsum("ri,ncrd->ncid", block.small.basis.to(jacobian), jacobian)
    inside = rotated @ block.large.basis.to(jacobian)
    results = []
    for precision in precisions:
        total = _gram(inside * (precision + kept).to(jacobian).rsqrt())
        if multiplicity:
            weight = (precision + rest).to(jacobian).rsqrt()[:, None]
            total = total + _gram(rotated * weight) - _gram(inside * weight)
        results.append(total)
    return torch.stack(results)


def _gram(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return flat @ flat.transpose(1, 2)


def orient(name: str, matrix: Tensor) -> Tensor:
    """The matrix as [..., r, d]: A as it is, B transposed."""
    return matrix if name.endswith(".A") else matrix.transpose(-1, -2)


unorient = orient  # transposing is its own inverse


def check(curvature: Curvature, precision: Mapping[str, float], mean: Theta) -> None:
    """Refuse a Laplace whose parts do not fit together. Raises PosteriorError."""
    if set(curvature) != set(mean) or set(precision) != set(mean):
        raise PosteriorError("the Laplace factors do not cover the MAP adapter's matrices; refit the posterior")
    for name, block in curvature.items():
        if block.shape != tuple(orient(name, mean[name]).shape):
            raise PosteriorError(
                f"the Laplace factor of {name} has shape {block.shape}, the adapter {tuple(mean[name].shape)}; refit"
            )
        if not precision[name] > 0:
            raise PosteriorError(f"the prior precision of {name} is {precision[name]}; it must be positive")
