"""The plan for candidates of several tokens, and the fix of vLLM's sampler, on tensors."""

from __future__ import annotations

import pytest
import torch

from server.engine.config import set_environment
from server.engine.scoring import MAX_TOKENS, prefix_tree, reads, sum_over_tokens

set_environment("cpu")  # before vLLM, as the server does

from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS  # noqa: E402


def test_one_request_per_distinct_prefix() -> None:
    assert prefix_tree(((1,), (2,))) == {(): [1, 2]}
    assert prefix_tree(((1, 5), (1, 6), (2,), (1,))) == {(): [1, 2], (1,): [5, 6]}


def test_no_request_scores_more_tokens_than_vllm_takes() -> None:
    """255 candidates that begin differently, one of them followed by 130 ways to go on."""
    candidates = (*((token,) for token in range(255)), *((7, token) for token in range(130)))
    plan = reads(candidates)
    assert [(prefix, len(children)) for prefix, children in plan] == [((), 128), ((), 127), ((7,), 128), ((7,), 2)]
    joined = {prefix: [token for p, some in plan if p == prefix for token in some] for prefix, _ in plan}
    assert joined == prefix_tree(candidates)
    assert len(reads(candidates[:MAX_TOKENS])) == 1
    assert MAX_TOKENS == MAX_LOGPROB_TOKEN_IDS


def test_sums_are_the_chain_rule() -> None:
    """Against brute force over a random autoregressive table."""
    candidates = ((0, 1, 2), (0, 1), (2, 2, 2), (1,))
    generator = torch.Generator().manual_seed(0)
    tree = prefix_tree(candidates)
    table = {prefix: torch.randn(3, generator=generator).log_softmax(0) for prefix in tree}
    found = {(*prefix, token): float(table[prefix][token]) for prefix, children in tree.items() for token in children}
    expected = [sum(float(table[c[:t]][c[t]]) for t in range(len(c))) for c in candidates]
    assert sum_over_tokens(candidates, found).tolist() == pytest.approx(expected)
