"""Scores of a predictive against true labels, with bootstrap intervals. Probabilities [N, C], labels [N]; NLL in
nats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15  # equal-width bins of the calibration error, as in most of the literature


def accuracy(p: Tensor, y: Tensor) -> float:
    return float((p.argmax(1) == y).double().mean())


def nll(p: Tensor, y: Tensor) -> float:
    """Mean negative log-probability of the true label. A zero probability gives inf: it is not clipped away."""
    return float(-p.gather(1, y[:, None]).log().mean())


def brier(p: Tensor, y: Tensor) -> float:
    """Mean of sum_c (p_c - 1[c = y])^2, between 0 and 2 (Brier 1950)."""
    return float((p - torch.nn.functional.one_hot(y, p.shape[1])).square().sum(1).mean())


def ece(p: Tensor, y: Tensor, bins: int = BINS) -> float:
    """Expected calibration error of the top answer: bins (lower, upper], weighted by size (Guo et al. 2017)."""
    confidence, predicted = p.max(1)
    excess = confidence - (predicted == y).to(p)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return float(torch.zeros(bins).to(p).index_add(0, index, excess).abs().sum() / len(y))


def signed_gap(p: Tensor, y: Tensor) -> float:
    """Mean confidence minus accuracy: positive is over-confident, negative under-confident."""
    return float(p.max(1).values.mean()) - accuracy(p, y)


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "nll": nll,
    "brier": brier,
    "ece": ece,
    "gap": signed_gap,
}


@dataclass(frozen=True)
class Estimate:
    """A value on the whole test set and its central 95 % bootstrap interval over test rows."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(p: Tensor, y: Tensor, *, draws: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """All metrics with bootstrap intervals; the same seed resamples the same rows, so methods are compared on equal
    draws."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(y), (draws, len(y)), generator=generator)
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    result = {}
    for name, metric in METRICS.items():
        resampled = torch.tensor([metric(p[pick], y[pick]) for pick in picks], dtype=torch.float64)
        low, high = resampled.quantile(levels).tolist()
        result[name] = Estimate(metric(p, y), low, high)
    return result


def best_temperature(scores: Tensor, y: Tensor) -> float:
    """The T > 0 that minimises the NLL of softmax(scores / T) (Guo et al. 2017)."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: nll((scores / torch.tensor(log_t).exp()).softmax(1), y), bounds=(-4, 4), method="bounded"
    )
    return float(torch.tensor(found.x).exp())
