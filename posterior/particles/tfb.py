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
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch

from posterior.data.examples import batches
from posterior.likelihood.scores import log_likelihood
from posterior.likelihood.stacked import repeat, stack, stacked
from posterior.models import lora
from posterior.settings import POSITIVE, SettingError, setting
from posterior.training.method import ADAPTER, LORA, PARTICLES, SCALE, Job, Result, Sampled

SMALLEST, FIRST, LARGEST = 1e-6, 1e-3, 1e3  # sigmas: the search begins at FIRST
HALVINGS = 7  # of the last factor of two: sigma to 0.8 %


@dataclass(frozen=True, kw_only=True)
class Tfb(Sampled):
    """A trained adapter with as much noise as the data allow."""

    adapter: Path = setting(MISSING, ADAPTER)
    tolerance: float = setting(
        0.003, "tfb: share by which the noise may raise the negative log-likelihood", POSITIVE, PARTICLES
    )
    scale: float = setting(1.0, SCALE, POSITIVE, LORA)

    def fit(self, job: Job) -> Result:
        """K draws around the adapter, which map/ holds."""
        theta = lora.get(job.model)
        noise = [perturbation(theta, self.member_seed(index)) for index in range(self.particles)]
        own = -job.log_likelihood(self.batch_size)
        allowed = own * (1 + self.tolerance)

        def within(sigma: float) -> bool:
            return bool(loss(job, [moved(theta, one, sigma) for one in noise], self.batch_size) <= allowed)

        sigma = largest(within)
        thetas = [moved(theta, one, sigma) for one in noise]
        record = {
            "method": "tfb",
            "sigma": sigma,
            "tolerance": self.tolerance,
            "log_likelihood": -own,
            "predictive_log_likelihood": -loss(job, thetas, self.batch_size),
        }
        return self.result(thetas, theta, record, prior={})


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


def loss(job: Job, thetas: list[lora.Theta], batch_size: int) -> float:
    """- sum_n log (1/K) sum_k p(y_n|x_n, theta_k), in nats; inf when it is not a number."""
    total = 0.0
    with torch.no_grad(), stacked(job.model, stack(thetas)):
        for _, batch in batches(job.examples, batch_size):
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
            raise SettingError("even sigma {sigma:.1e} costs more than {tolerance} allows; raise it", sigma=2 * low)
    high = 2 * low
    while low >= FIRST and within(high):
        low, high = high, 2 * high
        if high > LARGEST:
            raise SettingError("no sigma up to {most:g} costs as much as {tolerance} allows; lower it", most=LARGEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low
