"""How many particles of a mixture are enough: they are added until those left out no longer matter.

K particles p_k with weights w_k that sum to 1, the heaviest first, make the target m = sum_k w_k p_k. The first n have
the weight W and the mixture m_n = sum_{k<=n} w_k p_k / W. The particles' probabilities of one prompt are taken as
independent draws from one distribution of variance s_c^2 for answer c, whatever their weights. Then m - m_n has the
mean 0 and the variance

    s_c^2 D_n,    D_n = ((1 - W) / W)^2 sum_{k<=n} w_k^2 + sum_{k>n} w_k^2,

which for equal weights is the finite-population correction D_n = 1/n - 1/K (Cochran 1977, section 2.6; there it needs
no distribution, only an order at random). s_c^2 is estimated by the first n, without bias. Two errors are estimated:

    total_variation   t sum_c s_c sqrt(D_n) / 2. The total variation of m_n from m is sum_c |m_c - m_nc| / 2, and E|x|
                      is at most the root of E x^2, so that at a fixed n this bounds its mean. t makes up in part for
                      an s_c that is too small by chance: T_{n-1} is within t as often as a Gaussian draw is within
                      1. It is 1.84 at two particles, 1.32 at three, and falls to 1.
    other_answer      sum_b T_{n-1}(-g_b / (s_b sqrt(D_n))) over all answers b but the most probable one, where g_b is
                      the gap of their probabilities in m_n, s_b^2 the variance of the particles' gaps and T Student's
                      distribution: a bound of the probability that m prefers some b.

Prompts stop where both are at most TOLERANCE, and that is the error to rely on: in simulations of the whole test
(tests/posterior/predictive/test_sequential.py) the mean total variation over all prompts, those that use all particles
among them, is below TOLERANCE where the particles' log-odds spread by up to half a nat. At one nat it is 1.2 times
that, and 1.6 times with outliers (T_3). It does not hold for each prompt, nor among those that stop early: a stop picks
out the estimates that are low by chance. On yelp's calibration rows they come to a quarter of the true mean.

A few particles that agree say nothing about one that does not: if one of 8 says something else, 2 that are drawn at
random miss it with probability 3/4, and the total variation is then an eighth of its distance from the others. Without
any assumption it is at most 1 - W.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.special import ndtr, stdtr, stdtrit
from torch import Tensor

FIRST = 2  # particles: one has no spread
TOLERANCE = 0.01


@dataclass(frozen=True)
class LeftOut:
    """How many particles were left out, and the estimates (above) that the stop is decided by: of the total variation,
    and of the probability that another answer would be the most probable one."""

    particles: int
    total_variation: float
    other_answer: float

    @property
    def negligible(self) -> bool:
        return max(self.total_variation, self.other_answer) <= TOLERANCE


def stages(k: int) -> Iterator[int]:
    """The numbers of particles at which a mixture of k may stop: each is half as large again as the one before."""
    n = FIRST
    while n < k:
        yield n
        n += n // 2
    yield k


def left_out(p: Tensor, weights: Tensor) -> LeftOut:
    """What the other particles may change: p [n, C] are the probabilities of the first n, weights [K] those of all."""
    n, w = len(p), weights.double() / weights.double().sum()
    if n == len(w):
        return LeftOut(0, 0.0, 0.0)
    p, scale, own = p.double(), math.sqrt(unexplained(w, n)), w[:n] / w[:n].sum()
    mean = own @ p
    best = int(mean.argmax())
    others = torch.arange(len(mean)) != best
    error = deviation(p[:, best, None] - p[:, others], own) * scale
    gap = mean[best] - mean[others]
    ratio = torch.where(gap > 0, gap / error.clamp(min=1e-300), 0.0)
    return LeftOut(
        particles=len(w) - n,
        total_variation=float(stdtrit(n - 1, ndtr(1)) * deviation(p, own).sum()) * scale / 2,
        other_answer=min(1.0, float(stdtr(n - 1, -ratio.numpy()).sum())),
    )


def unexplained(weights: Tensor, n: int) -> float:
    """D_n: the variance of the weighted mean of all values about that of the first n, as a share of one value's."""
    used, rest = weights[:n], weights[n:]
    return float((rest.sum() / used.sum()) ** 2 * used.square().sum() + rest.square().sum())


def deviation(x: Tensor, weights: Tensor) -> Tensor:
    """Standard deviation [C] of values x [n, C], whose weights sum to 1, n of at least 2: that of the unbiased
    variance."""
    centred = x - weights @ x
    return (weights @ centred.square() / (1 - weights.square().sum())).sqrt()
