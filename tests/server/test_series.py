"""Metrics of the real engine stay as many as they are, whatever particles run together."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.running import Running

CHOICE = {"answers": [" yes", " no"]}
KINDS: list[tuple[str, dict[str, Any]]] = [
    *(("/v1/predictive", CHOICE | {"model": "gang", "predictive": "mixture", "particles": k}) for k in (2, 3)),
    *(("/v1/predictive", CHOICE | {"model": "mood", "predictive": name}) for name in ("linearized", "mixture", "map")),
    ("/v1/predictive", CHOICE | {"model": "gang/map"}),
    ("/v1/completions", {"model": "gang", "max_tokens": 2}),
    ("/v1/completions", {"model": "mood/map", "max_tokens": 2}),
]


@pytest.mark.long
@pytest.mark.parametrize("count", [32, 1000])
def test_mixed_requests_add_no_series(server: Running, count: int) -> None:
    def ask(number: int) -> None:
        path, body = KINDS[number % len(KINDS)]
        prompt = f"Question {number}:"
        server.post(path, **body, **({"prompts": [prompt]} if path == "/v1/predictive" else {"prompt": prompt}))

    for number in range(len(KINDS)):
        ask(number)
    before = server.metrics().keys()
    numbers = list(range(count))
    random.Random(0).shuffle(numbers)  # so that every few run together in another combination
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, numbers))
    assert server.metrics().keys() == before
    assert any(name.startswith("vllm:") for name in before)
    assert not [name for name in before if "lora_requests_info" in name]
