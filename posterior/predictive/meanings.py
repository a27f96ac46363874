"""Semantic uncertainty of text under a posterior over weights: how probable each meaning is, and what of the doubt is
epistemic.

Answers y_1 .. y_n are drawn from the mixture p(y) = sum_k w_k p_k(y) and grouped by meaning (Kuhn et al. 2023,
arXiv 2302.09664; Farquhar et al. 2024). Every particle's log-probability of every answer is known, so that the joint
distribution of particle and meaning is estimated without bias by importance weights,

    J(k, c) = 1/n sum_{i in c} w_k p_k(y_i) / p(y_i),   E J(k, c) = w_k p_k(c).

Each answer's weights sum to one over the particles, so J sums to one, the probability of a meaning is the share of the
answers that have it, and mutual information of J, which is at least 0, is the epistemic part of semantic entropy. A
particle under which none of the answers is likely says nothing, and has a small weight in J.

Entropies of n draws are too low where meanings were not seen; so is every estimate of semantic entropy by counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posterior.predictive.mixture import Predictive, from_particles


@dataclass(frozen=True)
class Meanings:
    """M meanings of n answers, the most probable first. group [n]: the meaning of each answer; predictive: over the
    meanings, as of a choice, its particles being those of the posterior as the answers weigh them; error [M]: standard
    error of each probability from the number of answers."""

    group: Tensor
    predictive: Predictive
    error: Tensor

    def example(self, meaning: int) -> int:
        """The number of the first answer that has this meaning."""
        return int((self.group == meaning).nonzero()[0])


def meanings(
    log_p: Tensor, log_weights: Tensor, groups: Sequence[int], *, mass: Tensor | None = None, coverage: float = 0.9
) -> Meanings:
    """The distribution over meanings.

    Args:
        log_p: log p_k(y_i | x) [n, K] of whole answers, nats.
        log_weights: of the particles [K], normalised here.
        groups: the meaning of each answer [n], any numbers.
        mass: how much of the distribution each answer stands for [n]: its probability p(y_i) where the answers are all
            there are, each once; None: they are draws, 1/n each.
        coverage: of the intervals of the meanings' probabilities over the posterior.
    """
    numbers = torch.tensor([*groups])
    order = torch.unique(numbers, return_inverse=True)[1]
    count = int(order.max()) + 1
    each = torch.full((len(order),), 1 / len(order), dtype=torch.float64) if mass is None else mass.double()
    share = (log_p.double() + log_weights.double()).log_softmax(1).exp()  # w_k p_k(y_i) / p(y_i)
    joint = torch.zeros(log_p.shape[1], count, dtype=torch.float64).index_add_(1, order, (share * each[:, None]).T)
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, order, each)  # joint.sum(0), and equal where it is
    by_probability = total.argsort(descending=True, stable=True)
    joint, total = joint[:, by_probability], total[by_probability]
    weights = joint.sum(1)
    kept = weights > 0
    found = from_particles(joint[kept].log(), weights[kept], coverage)
    error = torch.zeros_like(total) if mass is not None else (total * (1 - total) / len(order)).clamp(min=0).sqrt()
    return Meanings(by_probability.argsort()[order], found, error)
