"""The plan for candidates of several tokens, and the fix of vLLM's sampler, on tensors."""

from __future__ import annotations

import pytest
import torch

from server.engine.scoring import prefix_tree, sum_over_tokens


def test_one_request_per_distinct_prefix() -> None:
    assert prefix_tree(((1,), (2,))) == {(): [1, 2]}
    assert prefix_tree(((1, 5), (1, 6), (2,), (1,))) == {(): [1, 2], (1,): [5, 6]}


def test_sums_are_the_chain_rule() -> None:
    """Against brute force over a random autoregressive table."""
    candidates = ((0, 1, 2), (0, 1), (2, 2, 2), (1,))
    generator = torch.Generator().manual_seed(0)
    tree = prefix_tree(candidates)
    table = {prefix: torch.randn(3, generator=generator).log_softmax(0) for prefix in tree}
    reads = {prefix: {token: float(table[prefix][token]) for token in children} for prefix, children in tree.items()}
    expected = [sum(float(table[c[:t]][c[t]]) for t in range(len(c))) for c in candidates]
    assert sum_over_tokens(candidates, reads).tolist() == pytest.approx(expected)
