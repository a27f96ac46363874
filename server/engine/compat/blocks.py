"""How many blocks of the KV cache a sequence takes: what is refused at the door and what the scheduler waits for are
counted by the same rule.

Layers that keep different things (Gemma 2 and 3: all tokens, or a sliding window) form groups. Each group has blocks of
its own, all from one pool.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv

Group = tuple[int, int | None]  # tokens of a block; the most blocks a sequence holds, None: no bound


def groups_of(kv_cache_config: Any, vllm_config: Any) -> list[Group]:
    """The groups of vLLM's KVCacheConfig. A sliding window's blocks are freed behind it, so it holds few."""
    flight, longest = vllm_config.max_in_flight_tokens, vllm_config.model_config.max_model_len
    found: list[Group] = []
    for group in kv_cache_config.kv_cache_groups:
        bound = getattr(group.kv_cache_spec, "max_admission_blocks_per_request", None)
        found.append((group.kv_cache_spec.block_size, bound and bound(flight, longest)))
    return found


def needed(groups: Sequence[Group], tokens: int) -> int:
    """Blocks that a sequence of so many tokens holds at most while it is computed."""
    counts = [(cdiv(tokens, size), most) for size, most in groups]
    return sum(count if most is None else min(count, most) for count, most in counts)


def longest(groups: Sequence[Group], blocks: int, limit: int) -> int:
    """Tokens, at most `limit`, of the longest sequence that so many blocks hold."""
    return bisect_right(range(limit + 1), blocks, key=lambda tokens: needed(groups, tokens)) - 1
