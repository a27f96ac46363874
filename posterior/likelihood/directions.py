"""Which combinations of the candidates' scores gradients are taken for: one backward pass each.

The softmax ignores a common shift of the scores, so that the differences of C - 1 candidates to the first say all. Of
more than EXACT candidates, gradients are taken for those that hold MASS of the probability at theta*, and MOST of them
at most. The others rise and fall together, as their common mass does to first order: by the gradient of
sum_c q_c f_c, with q their shares of it. Each also varies by itself, so that its variance is the mean one of those that
have a gradient: nothing tells it from them. benchmarks/options.py compares both.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 4  # candidates of which each has a gradient of its own, whatever its probability
MASS, MOST = 0.999, 16


def passes(candidates: int) -> int:
    """Backward passes that the moments of so many candidates take, at most."""
    return candidates - 1 if candidates <= EXACT else min(candidates - 1, MOST)


def differences(f: Tensor) -> Tensor:
    """[B, C - 1, C]: every candidate's score less the first one's."""
    width = f.shape[1]
    each = torch.eye(width, dtype=f.dtype, device=f.device)[1:]
    each[:, 0] = -1.0
    return each.expand(len(f), -1, -1)


def directions(f: Tensor) -> Tensor:
    """The combinations [B, D, C] of the scores f whose covariance is computed; where an example of a batch needs fewer
    than another, zeros fill up."""
    if f.shape[1] <= EXACT:
        return differences(f)
    p, members = _grouped(f)
    shares = members.to(p) * p[:, None]
    shares = shares / shares.sum(2, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    found = shares[:, 1:] - shares[:, :1]
    return found.masked_fill(~members[:, 1:].any(2, keepdim=True), 0.0).to(f)


def movements(f: Tensor) -> Tensor:
    """[B, C, D]: by which of the directions each score moves."""
    if f.shape[1] <= EXACT:
        return torch.eye(f.shape[1], dtype=f.dtype, device=f.device)[:, 1:].expand(len(f), -1, -1)
    return _grouped(f)[1][:, 1:].mT.to(f)


def remainder(f: Tensor, covariance: Tensor) -> Tensor:
    """What the variances [M, B, C] of the scores f [B, C] lack for candidates that share one direction, given the
    covariance [M, B, C, C] that the directions leave."""
    variance = covariance.diagonal(dim1=2, dim2=3)
    if f.shape[1] <= EXACT:
        return torch.zeros_like(variance)
    group = _grouped(f)[1]
    shared = (group & (group.sum(2, keepdim=True) > 1)).any(1)
    own = (~shared & ~group[:, 0]).to(variance)
    mean = (variance * own).sum(2, keepdim=True) / own.sum(1, keepdim=True).clamp(min=1)
    return (mean - variance).clamp(min=0) * shared


def _grouped(f: Tensor) -> tuple[Tensor, Tensor]:
    """p [B, C] in float64, and which candidates each of G groups has [B, G, C]: the most probable one, those that hold
    MASS with it, one each, and the others together."""
    p = f.double().softmax(1)
    ordered, order = p.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(1) - ordered
    kept = (before < MASS).sum(1, keepdim=True).clamp(max=MOST)
    group = torch.arange(f.shape[1], device=f.device).minimum(kept)
    number = torch.zeros_like(order).scatter(1, order, group)
    return p, number[:, None] == torch.arange(int(number.max()) + 1, device=f.device)[:, None]
