"""Which replica is asked first."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from server.replicas.affinity import PREFIX, SLACK, affinity, order

NAMES = [f"r{i}" for i in range(8)]
IDLE = dict.fromkeys(NAMES, 0)
KEYS = [f"mood prompt {i}" for i in range(2000)]


def test_a_key_has_one_place_and_keys_are_spread() -> None:
    first = [order(key, IDLE)[0] for key in KEYS]
    assert first == [order(key, dict(reversed(IDLE.items())))[0] for key in KEYS]
    counts = Counter(first)
    spread = math.sqrt(len(KEYS) / len(NAMES) * (1 - 1 / len(NAMES)))  # of a binomial count
    assert all(abs(counts[name] - len(KEYS) / len(NAMES)) < 4 * spread for name in NAMES)


def test_a_replica_that_leaves_moves_its_own_keys_only() -> None:
    rest = {name: 0 for name in NAMES if name != "r3"}
    for key in KEYS:
        before = order(key, IDLE)
        assert order(key, rest) == [name for name in before if name != "r3"]


def test_no_replica_gets_more_than_its_share_while_others_are_idle() -> None:
    """One key alone, 64 requests that do not end: the bound of each is SLACK times the mean, rounded up."""
    loads = dict(IDLE)
    for _ in range(64):
        loads[order("mood hot", loads)[0]] += 1
    assert max(loads.values()) <= math.ceil(SLACK * 64 / len(NAMES))
    assert loads[order("mood hot", IDLE)[0]] == max(loads.values())


def test_a_request_without_a_key_goes_to_the_least_busy() -> None:
    assert order("", {"a": 3, "b": 1, "c": 2})[0] == "b"


def test_those_that_failed_come_last_even_if_the_others_are_busy() -> None:
    assert order("mood x", {"a": 9, "b": 0, "c": 0}, {"b", "c"})[0] == "a"
    assert order("", {}) == [] and order("mood", {"a": 0}, {"a"}) == ["a"]


def test_a_key_is_the_model_and_how_the_prompt_begins() -> None:
    def key(**body: object) -> str:
        return affinity(json.dumps(body).encode())

    long = "a" * PREFIX
    assert key(model="mood", prompt=long + "b") == key(model="mood", prompt=long + "c") == f"mood {long}"
    assert key(model="mood", prompt="a") != key(model="gang", prompt="a") != key(model="gang", prompt="b")
    chat = [{"role": "system", "content": "s" * PREFIX}, {"role": "user", "content": "a"}]
    assert key(model="m", messages=chat) == key(model="m", messages=[chat[0], {"role": "user", "content": "b"}])
    for field in ("prompts", "inputs", "input", "state"):
        assert "one" in key(model="m", **{field: ["one", *["two"] * 9]})


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b"\xff", b'{"a": 1', b"[" * 100_000])
def test_a_body_that_is_none_has_no_key(body: bytes) -> None:
    assert affinity(body) == ""
