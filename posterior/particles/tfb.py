"""`--method tfb`: training-free Bayesianisation of a trained adapter (Shi et al. 2024, arXiv 2412.05723).

With the SVD B = U diag(d) V^T the posterior is q(A) = N(A, .) with A_k = A + sigma V diag(1/d) E_k and E_k standard
normal, so that the update's noise, B (A_k - A) = sigma U E_k, has the same size sigma in every direction that B can
write to. sigma is the largest, found by bisection, at which the predictive's negative log-likelihood of the data is not
above the adapter's own by more than a share, the tolerance. (The authors' public code returns the smallest it tried
above the tolerance.) All sigmas are tried with the same E_k, which are also those of the particles that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from posterior.data.examples import batches
from posterior.errors import PosteriorError
from posterior.likelihood.scores import log_likelihood
from posterior.likelihood.stacked import repeat, stack, stacked
from posterior.models import lora
from posterior.training.job import Job, Result, particles

SMALLEST, FIRST, LARGEST = 1e-6, 1e-3, 1e3  # sigmas: the search begins at FIRST
HALVINGS = 7  # of the last factor of two: sigma to 0.8 %


def fit(job: Job) -> Result:
    """K draws around --adapter, which map/ holds."""
    args = job.args
    theta = lora.get(job.model)
    noise = [perturbation(theta, job.member_seed(index)) for index in range(args.particles)]
    own = -job.log_likelihood()
    allowed = own * (1 + args.tolerance)

    def within(sigma: float) -> bool:
        return bool(loss(job, [moved(theta, one, sigma) for one in noise]) <= allowed)

    sigma = largest(within)
    thetas = [moved(theta, one, sigma) for one in noise]
    record = {
        "method": "tfb",
        "sigma": sigma,
        "tolerance": args.tolerance,
        "log_likelihood": -own,
        "predictive_log_likelihood": -loss(job, thetas),
    }
    return replace(particles(thetas, theta, job, record), prior={})


def perturbation(theta: lora.Theta, seed: int) -> lora.Theta:
    """V diag(1/d) E for every A [r, in]. Directions that B ignores (d = 0 to rounding) get no noise."""
    generator = torch.Generator().manual_seed(seed)
    result: lora.Theta = {}
    for name, value in theta.items():
        if name.endswith(".A"):
            _, d, vt = torch.linalg.svd(theta[name[:-1] + "B"].double(), full_matrices=False)
            kept = d > 1e-6 * d.max()
            inverse = torch.where(kept, 1 / d.where(kept, torch.ones_like(d)), torch.zeros_like(d))
            noise = torch.randn(len(d), value.shape[1], generator=generator, dtype=torch.float64).to(vt)
            result[name] = (vt.mT @ (inverse[:, None] * noise)).to(value)
    return result


def moved(theta: lora.Theta, noise: lora.Theta, sigma: float) -> lora.Theta:
    return {name: value + sigma * noise[name] if name in noise else value.clone() for name, value in theta.items()}


def loss(job: Job, thetas: list[lora.Theta]) -> float:
    """- sum_n log (1/K) sum_k p(y_n|x_n, theta_k), in nats; inf when it is not a number."""
    total = 0.0
    with torch.no_grad(), stacked(job.model, stack(thetas)):
        for _, batch in batches(job.examples, job.args.batch_size):
            rows = log_likelihood(job.model, repeat(batch.to(job.device), len(thetas))).view(len(thetas), -1).double()
            total -= float((rows.logsumexp(0) - math.log(len(thetas))).sum())
    return total if math.isfinite(total) else math.inf


def largest(within: Callable[[float], bool]) -> float:
    """The largest sigma that is within: halved or doubled until the next is not, then bisected. What is returned was
    itself found within."""
    low = FIRST
    while not within(low):
        low /= 2
        if low < SMALLEST:
            raise PosteriorError(f"even sigma {2 * low:.1e} costs more than --tolerance allows; raise it")
    high = 2 * low
    while low >= FIRST and within(high):
        low, high = high, 2 * high
        if high > LARGEST:
            raise PosteriorError(f"no sigma up to {LARGEST:g} costs as much as --tolerance allows; lower it")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low
