"""The posterior predictive of one token: K distributions over the vocabulary, one mixture, and its entropies.

On a CPU the passes over [G, K, V] numbers are what mixing costs, so there are as few as possible: probabilities are
formed once, their mixture is a product with the weights, and only the mixture's logarithm is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = math.log(1e-30)  # a mixture below this is summed again in logarithms, before float32 loses its digits


def mix(logits: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mixture log-probabilities [G, V], log sum_v exp(logits) [G, K], entropies [G, 2]) from float32 logits [G, K, V]
    and log_weights [G, K]; nats. The entropies are those of the mixture and the weighted mean of the particles'.

    The logits are shifted in place, so that each particle's largest is 0: small numbers keep their digits in the sums.
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    p = logits.softmax(-1)
    log_z = -p.amax(-1).log()
    log_w = log_weights.to(log_z)
    mean = torch.bmm(log_w.exp()[:, None], p)[:, 0]
    mixture = mean.log()
    if float(mixture.amin()) < TINY:
        gangs, tokens = (mixture < TINY).nonzero(as_tuple=True)
        mixture[gangs, tokens] = torch.logsumexp(logits[gangs, :, tokens] + (log_w - log_z)[gangs], 1)
    aleatoric = (log_w.exp() * (log_z - _mean(p, logits))).sum(1)
    return mixture, log_z, torch.stack([-_mean(mean, mixture), aleatoric], 1)


def _mean(p: Tensor, values: Tensor) -> Tensor:
    """sum_v p values, where 0 * -inf is 0. Overwrites p."""
    terms = p.mul_(values)
    total = terms.sum(-1)
    return terms.nansum(-1) if bool(total.isnan().any()) else total
