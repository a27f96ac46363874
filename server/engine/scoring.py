"""Candidates of several tokens as one-token reads: the plan, free of vLLM."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from posterior.data.candidates import Candidates

Prefix = tuple[int, ...]


def prefix_tree(candidates: Candidates) -> dict[Prefix, list[int]]:
    """{tokens already given: next tokens to score}, one entry per distinct prefix of the candidates.

    Each entry is one request, the log-probabilities of a few next tokens. One-token candidates need a single entry, ().
    """
    tree: dict[Prefix, dict[int, None]] = {}
    for tokens in candidates:
        for position, token in enumerate(tokens):
            tree.setdefault(tokens[:position], {})[token] = None
    return {prefix: list(children) for prefix, children in tree.items()}


def sum_over_tokens(candidates: Candidates, reads: Mapping[Prefix, Mapping[int, float]]) -> torch.Tensor:
    """log p(candidate | prompt) = sum_t log p(token_t | prompt, tokens before t), [candidates], float64 (nats)."""
    sums = [sum(reads[tokens[:position]][token] for position, token in enumerate(tokens)) for tokens in candidates]
    return torch.tensor(sums, dtype=torch.float64)
