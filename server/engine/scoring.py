"""Candidates of several tokens as one-token reads: the plan, free of vLLM."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from posterior.data.candidates import Candidates

MAX_TOKENS = 128  # whose log-probabilities one request may ask for: vLLM's MAX_LOGPROB_TOKEN_IDS

Prefix = tuple[int, ...]


def prefix_tree(candidates: Candidates) -> dict[Prefix, list[int]]:
    """{tokens already given: next tokens to score}, one entry per distinct prefix of the candidates.

    One-token candidates need a single entry, ().
    """
    tree: dict[Prefix, dict[int, None]] = {}
    for tokens in candidates:
        for position, token in enumerate(tokens):
            tree.setdefault(tokens[:position], {})[token] = None
    return {prefix: list(children) for prefix, children in tree.items()}


def reads(candidates: Candidates) -> list[tuple[Prefix, list[int]]]:
    """(tokens already given, next tokens to score) of each request that the candidates take, the one without tokens
    given first: an entry of the tree each, or several for more than MAX_TOKENS next tokens."""
    return [
        (prefix, children[start : start + MAX_TOKENS])
        for prefix, children in prefix_tree(candidates).items()
        for start in range(0, len(children), MAX_TOKENS)
    ]


def sum_over_tokens(candidates: Candidates, found: Mapping[Prefix, float]) -> torch.Tensor:
    """log p(candidate | prompt) = sum_t log p(token_t | prompt, tokens before t), [candidates], float64 (nats).

    found: log p of the last of some tokens, given the prompt and the others of them.
    """
    sums = [sum(found[tokens[: position + 1]] for position in range(len(tokens))) for tokens in candidates]
    return torch.tensor(sums, dtype=torch.float64)
