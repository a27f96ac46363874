"""Laplace: theta ~ N(theta*, P^-1), P = lambda I + c H block by block, H from Kronecker factors or their diagonal.

Blocks give draws of theta. The covariance of scores can be had without them, from the whole Fisher (sketch.Full).

After Laplace-LoRA (arXiv 2308.13111). The prior is N(theta_0, I / lambda) with theta_0 the initialisation (A random, B
zero), not zero: the random A is evidence of nothing. A group is a set of matrices that share one lambda. The evidence
of a group is, up to a constant,
    log p(D|theta*) - (lambda/2) |theta* - theta_0|^2 - (1/2) [logdet P - D log lambda] / c,
separable over groups; its stationary point is MacKay's lambda = gamma / |theta* - theta_0|^2 with the effective
dimension gamma = (1/c) sum c v / (c v + lambda) over the eigenvalues v of H.

The coupling c >= 1 stands for what the blocks leave out. All matrices see the same data and their gradients go
together: N examples determine at most N (C-1) directions, however many blocks there are. A block by itself is told of
its own share of each of these only, and finds the data weak. With one datum and B blocks whose gradients have squared
norm v, the score's variance is B v / (lambda + B v), but B v / (lambda + v) by blocks: the predictive is
under-confident, and the evidence, which counts one direction B times, chooses too large a lambda. So c makes gamma that
of the whole Fisher, sum e / (1 + e) over the eigenvalues e of the Fisher whitened by the prior
(posterior/curvature/sketch.py); in the example c = B. As gamma = tr H P^-1, the total variance of the training scores
(weighted by the Fisher) is then what it is without blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from posterior.curvature.kfac import Block
from posterior.curvature.sketch import Sketch
from posterior.errors import PosteriorError
from posterior.models.lora import Theta, orient
from posterior.training.prior import Grouping, groups

Curvature = Mapping[str, Block]
Precision = dict[str, float]
SPAN = 32  # directions of a matrix's large side that samples move in
SAMPLER = 1  # names cached draws: raise it whenever `sample` would draw others
LOG_BOUNDS = (math.log(1e-4), math.log(1e8))


class Covariance(Protocol):
    """The Gaussian's covariance, as the linearised predictive needs it. precision: of each uncertain matrix."""

    @property
    def precision(self) -> Mapping[str, float]: ...

    def to(self, device: torch.device | str) -> Covariance: ...

    def rescaled(self, factor: float) -> Covariance:
        """With `factor` times the prior precision."""
        ...

    def of_scores(self, jacobians: Iterable[tuple[str, Tensor]], factors: Sequence[float] = (1.0,)) -> Tensor:
        """J P^-1 J^T [M, B, C, C] in float64, at M multiples of the prior precision, from each matrix's
        [B, C, r, d]."""
        ...


@dataclass(frozen=True)
class Blocks:
    """Block by block; `curvature`: c H."""

    curvature: Curvature
    precision: Mapping[str, float]

    def to(self, device: torch.device | str) -> Blocks:
        return Blocks({name: block.to(device) for name, block in self.curvature.items()}, self.precision)

    def rescaled(self, factor: float) -> Blocks:
        return Blocks(self.curvature, {name: value * factor for name, value in self.precision.items()})

    def of_scores(self, jacobians: Iterable[tuple[str, Tensor]], factors: Sequence[float] = (1.0,)) -> Tensor:
        total = torch.zeros(())
        for name, jacobian in jacobians:
            precisions = [self.precision[name] * factor for factor in factors]
            total = total + quadratic(self.curvature[name], precisions, jacobian)
        return total.double()


def logdet_ratio(block: Block, precision: float) -> float:
    """logdet P - D log lambda = sum log(1 + v / lambda) of one matrix."""
    kept, rest, multiplicity = block.eigenvalues()
    total = torch.log1p(kept.double() / precision).sum() + multiplicity * torch.log1p(rest.double() / precision).sum()
    return float(total)


def effective_dimension(block: Block, precision: float) -> float:
    """gamma = sum v / (v + lambda): how many of the matrix's parameters the data determine."""
    kept, rest, multiplicity = block.eigenvalues()
    kept, rest = kept.double(), rest.double()
    return float((kept / (kept + precision)).sum() + multiplicity * (rest / (rest + precision)).sum())


def square_distance(theta: Theta, origin: Theta, names: list[str]) -> float:
    """|theta - theta_0|^2 over the named matrices."""
    return sum(float((theta[name].double() - origin[name].double()).square().sum()) for name in names)


def evidence(
    curvature: Curvature,
    distance: Mapping[str, float],
    precision: Mapping[str, float],
    log_likelihood: float,
    coupling: float = 1.0,
) -> float:
    """log p(D) in nats. distance and precision by matrix name: |theta* - theta_0|^2 and lambda of each.

    `curvature`: c H, with c the coupling.
    """
    penalty = sum(
        precision[name] * distance[name] + logdet_ratio(block, precision[name]) / coupling
        for name, block in curvature.items()
    )
    return log_likelihood - penalty / 2


def optimal_precision(
    curvature: Curvature,
    distance: Mapping[str, float],
    grouping: Grouping,
    fixed: Mapping[str, float] | None = None,
    coupling: float = 1.0,
) -> Precision:
    """The prior precision of each matrix that maximises the evidence, group by group, to convergence in log lambda.

    The matrices in `fixed` keep the precision given there. `curvature`: c H, with c the coupling.
    """
    best: Precision = dict(fixed or {})
    for names in groups([name for name in curvature if name not in best], grouping).values():
        moved = sum(distance[name] for name in names)

        def loss(log_lambda: float, names: list[str] = names, moved: float = moved) -> float:
            precision = math.exp(log_lambda)
            return precision * moved + sum(logdet_ratio(curvature[name], precision) for name in names) / coupling

        found = minimize_scalar(loss, bounds=LOG_BOUNDS, method="bounded", options={"xatol": 1e-6})
        best.update(dict.fromkeys(names, math.exp(float(found.x))))
    return best


def settle(
    curvature: Curvature,
    sketch: Sketch,
    distance: Mapping[str, float],
    grouping: Grouping,
    fixed: Mapping[str, float],
) -> tuple[Precision, float]:
    """The prior precision that maximises the evidence, and the coupling there.

    One precision for all the matrices outside `fixed` is chosen with the log-determinant of the whole Fisher. Other
    groupings start from its coupling and share the evidence out over blocks, as the sketch does not know the groups.
    `curvature`: H.
    """
    opened = [name for name in curvature if name not in fixed]
    moved = sum(distance[name] for name in opened)

    def loss(log_lambda: float) -> float:
        precision = math.exp(log_lambda)
        return precision * moved + sketch.log_determinant(precision)

    best = math.exp(float(minimize_scalar(loss, bounds=LOG_BOUNDS, method="bounded", options={"xatol": 1e-4}).x))
    common = dict.fromkeys(opened, best) | dict(fixed)
    c = coupling(curvature, common, sketch.eigenvalues(best))
    if grouping == "scalar":
        return common, c
    return optimal_precision(coupled(curvature, c), distance, grouping, fixed, c), c


def coupling(curvature: Curvature, precision: Mapping[str, float], eigenvalues: Tensor) -> float:
    """The c at which the blocks' effective dimension is that of the whole Fisher; see the top of this file.

    `curvature`: H; `eigenvalues`: those of the whole Fisher whitened by the prior.
    """
    whole = float((eigenvalues / (1 + eigenvalues)).sum())

    def excess(log_c: float) -> float:
        c = math.exp(log_c)
        return sum(effective_dimension(block, precision[name] / c) for name, block in curvature.items()) / c - whole

    if excess(0.0) <= 0:  # blocks can only add to gamma (concavity), so less is the sketch's error
        return 1.0
    parameters = sum(math.prod(block.shape) for block in curvature.values())
    return math.exp(float(brentq(excess, 0.0, math.log(parameters / whole))))


def coupled(curvature: Curvature, c: float) -> dict[str, Block]:
    """c H."""
    return {name: block.scaled(c) for name, block in curvature.items()}


def sample(
    curvature: Curvature,
    precision: Mapping[str, float],
    mean: Theta,
    generator: torch.Generator,
    width: float = 1.0,
) -> Theta:
    """One draw theta* + w P^{-1/2} eps, w the width (posterior/laplace/width.py), matrix by matrix in the curvature's
    eigenbasis; matrices without a curvature are certain. Drawn on the CPU: the seed fixes it anywhere.

    eps is zero outside the SPAN leading directions of each matrix's large side. There the data say nothing: the scores
    that the covariance is about do not move, to first order, but the network does, as it is not linear, and the prior's
    whole width in thousands of directions at once destroys it (measured on yelp: accuracy .60 with them, .92 without).
    """
    moved = {
        name: mean[name] + orient(name, width * _draw(block, precision[name], generator)).to(mean[name])
        for name, block in curvature.items()
    }
    return dict(mean) | moved


def _draw(block: Block, precision: float, generator: torch.Generator) -> Tensor:
    small, large, curvature = block.leading(SPAN)
    noise = torch.randn(curvature.shape, generator=generator, dtype=torch.float64)
    return small @ (noise * (precision + curvature).rsqrt()) @ large.T


def quadratic(block: Block, precisions: Sequence[float], jacobian: Tensor) -> Tensor:
    """J P^-1 J^T [M, N, C, C] of one matrix for M prior precisions; jacobian [N, C, r, d] oriented like the block (see
    `orient`)."""
    kept, rest, multiplicity = block.eigenvalues()
    inside, rotated = block.coordinates(jacobian)
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


def check(curvature: Curvature, precision: Mapping[str, float], mean: Theta) -> None:
    """Refuse a Laplace whose parts do not fit together: matrices without a curvature are certain, others have a prior
    precision. Raises PosteriorError."""
    if not curvature or set(curvature) != set(precision) or not set(curvature) <= set(mean):
        raise PosteriorError("the Laplace factors do not cover the MAP adapter's matrices; refit the posterior")
    for name, block in curvature.items():
        if block.shape != tuple(orient(name, mean[name]).shape):
            raise PosteriorError(
                f"the Laplace factor of {name} has shape {block.shape}, the adapter {tuple(mean[name].shape)}; refit"
            )
        if not precision[name] > 0:
            raise PosteriorError(f"the prior precision of {name} is {precision[name]}; it must be positive")
