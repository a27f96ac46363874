"""The number of texts of one request is bounded before any of them is begun."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.server import fakes
from tests.server.conftest import error_of

CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("path", "model", "body", "words"),
    [
        ("completions", "mood", {"prompt": ["x"] * 256, "n": 128}, "256 prompts x n = 128 x 8 particles are 262144"),
        ("completions", "mood", {"prompt": [[1, 2]] * 256, "n": 5}, "256 prompts x n = 5 x 8 particles are 10240"),
        (
            "completions",
            "mood",
            {"prompt": ["x"] * 256, "n": 33, "uncertainty": {"predictive": "map"}},
            "x 1 particles",
        ),
        ("completions", "tiny-base", {"prompt": ["x"] * 256, "n": 33}, "256 prompts x n = 33 x 1 particles are 8448"),
        ("completions", "gang", {"prompt": ["x"] * 256, "n": 11, "stream": True}, "are 8448 sequences"),
    ],
)
def test_too_many_texts(
    client: TestClient, engine: fakes.Engine, path: str, model: str, body: dict[str, Any], words: str
) -> None:
    error = error_of(client.post(f"/v1/{path}", json={"model": model, **body}), 400)
    assert words in error["message"] and "one request may have 8192" in error["message"] and error["param"] == "n"
    assert engine.bodies == [], "nothing was begun"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": ["x"] * 256, "n": 4}),
        ("completions", {"prompt": list(range(1, 257)), "n": 128}),  # one prompt of 256 tokens
        ("chat/completions", {**CHAT, "n": 128}),
    ],
)
def test_as_many_as_are_served(client: TestClient, engine: fakes.Engine, path: str, body: dict[str, Any]) -> None:
    assert client.post(f"/v1/{path}", json={"model": "mood", **body}).status_code == 200
    assert len(engine.bodies) == 1
