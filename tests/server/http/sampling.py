"""Requests with samples, and what the fake engine draws for them."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient

from tests.server.fakes import Draft
from tests.server.http.test_answers import MESSAGES

DRAFTS = [
    Draft("London", [[-1.5, -0.4, -4.0], [-0.1, -0.2, -0.3]]),
    Draft(" Paris.", [[-0.9, -2.0, -0.3], [-0.5, -0.1, -0.2], [-0.2, -0.2, -0.1]]),
    Draft("Rome and", [[-2.0, -3.0, -1.0]], "length"),
    Draft("paris", [[-0.7, -2.5, -0.4]]),
    Draft("the Paris", [[-4.0, -3.0, -2.0], [-0.7, -2.5, -0.4]]),
]
N = len(DRAFTS)


def ask(client: TestClient, samples: int = N, **body: Any) -> Any:
    options = {"samples": samples, **body.pop("uncertainty", {})}
    return client.post("/v1/completions", json={"model": "gang", "prompt": "x", "uncertainty": options, **body})


def chat(client: TestClient, samples: int = N, **body: Any) -> Any:
    options = {"samples": samples, **body.pop("uncertainty", {})}
    whole = {"model": "gang", "messages": MESSAGES, "uncertainty": options, **body}
    return client.post("/v1/chat/completions", json=whole)
