"""Metrics stay as many as they are: nothing that a client makes up becomes a label."""

from __future__ import annotations

import re

from fastapi.testclient import TestClient

from server.access.keys import Keys
from server.http.app import create_app
from server.services.predictive import Service

KEY = {"Authorization": "Bearer s3cret"}
MODELS = ("tiny-base", "mood", "mood/map", "gang", "gang/map")


def series(service: Service) -> set[str]:
    """Every series of ours, by its name and labels. When something was created is none."""
    lines = service.metrics.text().decode().splitlines()
    return {line.rpartition(" ")[0] for line in lines if not re.match("#|vllm:|python_|process_", line)}


def ask(client: TestClient, number: int) -> None:
    """One of many kinds of requests, most of them with something that no other request has."""
    model, own = MODELS[number % len(MODELS)], f"made-up-{number}"
    choice = {"model": model, "prompts": [own], "answers": [" a", " b"]}
    text = {"model": model, "prompt": own, "max_tokens": 1}
    kinds = (
        lambda: client.post("/v1/predictive", json=choice, headers=KEY | {"X-Request-Id": own}),
        lambda: client.post("/v1/completions", json=text, headers=KEY | {"User-Agent": own}),
        lambda: client.post("/v1/completions", json=text | {"stream": True}, headers=KEY),
        lambda: client.post("/v1/predictive", json=choice | {"model": own}, headers=KEY),
        lambda: client.post("/v1/predictive", json=choice | {own: 1, "predictive": own}, headers=KEY),
        lambda: client.post("/v1/predictive", json=choice, headers={"Authorization": f"Bearer {own}"}),
        lambda: client.get(f"/{own}", headers=KEY),
        lambda: client.get(f"/v1/models/{own}", headers=KEY),
    )
    assert kinds[number // len(MODELS) % len(kinds)]().status_code in (200, 400, 401, 404)


def test_a_thousand_mixed_requests_add_no_series(service: Service) -> None:
    app = create_app(service, Keys("s3cret"))
    app.state.ready = True
    with TestClient(app) as client:
        for number in range(40):  # each kind with each model
            ask(client, number)
        before = series(service)
        for number in range(40, 1040):
            ask(client, number)
        assert series(service) == before and len(before) > 100
