"""The posterior predictive of a choice: probabilities, entropies (nats), variances, and the Monte-Carlo error of what
is returned.

p(y|x) = sum_k w_k p_k(y|x): probabilities are averaged, never logits. total = H[p], aleatoric = sum_k w_k H[p_k],
epistemic = total - aleatoric (mutual information, >= 0). Epistemic variance of answer y: Var_k[p_k(y)].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor

SCRAMBLES = 16  # independent randomisations of the quasi-Monte-Carlo points; their spread is the Monte-Carlo error


@dataclass(frozen=True)
class Predictive:
    """All tensors float64 on the CPU; C candidates.

    probability, variance (epistemic), std, total_variance p(1-p), mc_error (standard error of probability): [C];
    interval: [C, 2], central posterior interval of p(y); covariance: [C, C] of p over the posterior;
    total, aleatoric, epistemic: nats; effective_particles: 1 / sum w^2; particles: how many were averaged.
    """

    probability: Tensor
    variance: Tensor
    std: Tensor
    interval: Tensor
    covariance: Tensor
    total_variance: Tensor
    mc_error: Tensor
    total: float
    aleatoric: float
    epistemic: float
    effective_particles: float
    particles: int


def entropy(p: Tensor) -> Tensor:
    """-sum p log p over the last dimension, in nats; 0 log 0 = 0."""
    result: Tensor = torch.special.entr(p).sum(-1)
    return result


def from_particles(log_p: Tensor, weights: Tensor, coverage: float = 0.9) -> Predictive:
    """Predictive of K particles: log_p [K, C] (softmax-normalised here), weights [K] >= 0 (normalised here).

    The covariance is the unbiased weighted one, divided by 1 - sum w^2; one particle has no spread. The Monte-Carlo
    error is that of K weighted independent draws, sqrt(variance * sum w^2).
    """
    p = log_p.double().log_softmax(1).exp()
    w = weights.double() / weights.double().sum()
    concentration = float(w.square().sum())
    mean = w @ p
    centred = p - mean
    scale = 1 - concentration
    covariance = (
        (w[:, None] * centred).T @ centred / scale if scale > 1e-12 else torch.zeros(p.shape[1], p.shape[1]).double()
    )
    error = (covariance.diagonal() * concentration).sqrt()
    return _assemble(p, w, mean, covariance, error, coverage, 1 / concentration)


def among(log_p: Tensor, log_weights: Tensor, coverage: float = 0.9) -> Predictive:
    """Predictive of the mixture that is cut to C of its texts: log_p [K, C] of these under each particle, nats, not
    normalised; log_weights [K] of the particles, any sum.

    p(c | one of the C) = sum_k w_k p_k(c) / sum_k w_k sum_c' p_k(c'). That it is one of them tells about the particles
    too (Bayes' rule): their weights become w_k sum_c p_k(c), and each has its own distribution over the C.
    """
    log_p = log_p.double()
    given = (log_weights.double() + log_p.logsumexp(1)).softmax(0)
    kept = given > 0
    return from_particles(log_p[kept], given[kept], coverage)


def from_gaussian(
    mean: Tensor, covariance: Tensor, *, samples: int = 1024, seed: int = 0, coverage: float = 0.9
) -> Predictive:
    """Predictive of Gaussian scores f ~ N(mean [C], covariance [C, C]): `samples` virtual particles softmax(f).

    f = mean + L xi with Owen-scrambled Sobol points xi: the same numbers for the same seed, and an error far below
    plain Monte Carlo's; the error is estimated from the spread of independent scrambles.
    """
    noise = normal_points(len(mean), samples, seed, SCRAMBLES)
    f = mean.double() + noise @ square_root(covariance.double()).T
    p = f.softmax(1)
    weights = torch.full((len(p),), 1 / len(p), dtype=torch.float64)
    average = p.mean(0)
    centred = p - average
    spread = centred.T @ centred / (len(p) - 1)
    error = p.view(SCRAMBLES, -1, p.shape[1]).mean(1).std(0) / math.sqrt(SCRAMBLES)
    return _assemble(p, weights, average, spread, error, coverage, float(len(p)))


def _assemble(
    p: Tensor, w: Tensor, mean: Tensor, covariance: Tensor, error: Tensor, coverage: float, effective: float
) -> Predictive:
    variance = covariance.diagonal().clamp(min=0).clone()
    total, aleatoric = float(entropy(mean)), float(w @ entropy(p))
    return Predictive(
        probability=mean,
        variance=variance,
        std=variance.sqrt(),
        interval=_interval(p, w, coverage),
        covariance=covariance,
        total_variance=mean * (1 - mean),
        mc_error=error,
        total=total,
        aleatoric=min(aleatoric, total),
        epistemic=max(0.0, total - aleatoric),
        effective_particles=effective,
        particles=len(p),
    )


def _interval(p: Tensor, w: Tensor, coverage: float) -> Tensor:
    """Central interval [C, 2]: the weighted quantiles at (1 - coverage)/2 and (1 + coverage)/2.

    A level counts as reached 1e-12 early: sums of weights are rounded, and ten times 0.1 is less than 1.
    """
    levels = np.array([(1 - coverage) / 2, (1 + coverage) / 2]) - 1e-12
    found = np.quantile(p.numpy(), levels.clip(min=0), axis=0, weights=w.numpy(), method="inverted_cdf")
    return torch.from_numpy(found.T)


@lru_cache(maxsize=16)
def normal_points(dimension: int, samples: int, seed: int, scrambles: int = 1) -> Tensor:
    """Standard normal points [scrambles * 2^m >= samples, dimension] from independently scrambled Sobol sequences."""
    each = 1 << max(0, math.ceil(math.log2(samples / scrambles)))
    engines = [qmc.Sobol(dimension, rng=rng) for rng in np.random.default_rng(seed).spawn(scrambles)]
    zero = np.zeros(dimension)
    points = [qmc.MultivariateNormalQMC(zero, engine=engine).random(each) for engine in engines]
    return torch.from_numpy(np.concatenate(points))


def square_root(covariance: Tensor) -> Tensor:
    """A square root of positive semi-definite matrices [..., C, C] (which may be singular, so no Cholesky)."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    root: Tensor = vectors * values.clamp(min=0).sqrt()[..., None, :]
    return root
