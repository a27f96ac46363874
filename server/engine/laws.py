"""The posterior predictive of one token: K laws over the vocabulary, one mixture, and its entropies."""

from __future__ import annotations

import torch
from torch import Tensor


def mix(logits: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mixture log-probabilities [G, V], the particles' log_p [G, K, V], entropies [G, 2]) from logits [G, K, V] and
    log_weights [G, K]; float32, nats."""
    log_p = logits.float().log_softmax(-1)
    log_w = log_weights.to(log_p)[..., None]
    mixture = torch.logsumexp(log_p + log_w, 1)
    aleatoric = (log_w[..., 0].exp() * _entropy(log_p)).sum(1)
    return mixture, log_p, torch.stack([_entropy(mixture), aleatoric], 1)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)  # the clamp keeps 0 * -inf out
