"""The routes, the key, readiness, metrics and clients that leave."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from posterior.errors import PosteriorError
from server.access.exposure import check_exposure
from server.access.keys import Keys
from server.errors import Unavailable
from server.http.app import create_app
from server.services.predictive import Service
from tests.server import fakes
from tests.server.conftest import error_of

PREDICT = {"model": "gang", "inputs": [{"text": "good"}]}
OPEN = {"/health", "/ready", "/", "/web/{name}", "/docs", "/docs/{name}"}
ROUTES = {
    ("GET", "/health"), ("GET", "/ready"), ("GET", "/version"), ("GET", "/metrics"), ("GET", "/v1/models"),
    ("GET", "/v1/models/{name:path}"), ("POST", "/v1/predictive"), ("POST", "/v1/decisions"),
    ("POST", "/v1/systemone"), ("POST", "/v1/outcomes"), ("DELETE", "/v1/outcomes/{id:path}"),
    ("GET", "/v1/outcomes/report"),
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/openapi.json"), ("GET", "/docs"),
    ("GET", "/docs/{name}"), ("GET", "/v1/posteriors"), ("POST", "/v1/posteriors"),
    ("DELETE", "/v1/posteriors/{name}"), ("GET", "/v1/aliases"), ("PUT", "/v1/aliases/{name}"),
    ("DELETE", "/v1/aliases/{name}"), ("GET", "/"), ("GET", "/web/{name}"),
}  # fmt: skip


def test_exactly_these_routes_exist(client: TestClient) -> None:
    routes = {(method, route.path) for route in client.app.routes for method in route.methods - {"HEAD"}}  # type: ignore[attr-defined]
    assert routes == ROUTES
    assert error_of(client.get("/openapi"), 404)
    response = client.get("/v1/predictive")
    assert error_of(response, 405) and response.headers["allow"] == "POST"


def test_models_name_their_base(client: TestClient) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tiny-base", "mood", "mood/map", "gang", "gang/map"]
    assert [card["parent"] for card in cards] == [None] + ["tiny-base"] * 4
    assert client.get("/v1/models/mood/map").json()["id"] == "mood/map"
    assert error_of(client.get("/v1/models/nobody"), 404)["code"] == "model_not_found"


def test_without_the_key_only_what_holds_no_data_answers(service: Service) -> None:
    app = create_app(service, Keys("s3cret-ключ"))
    app.state.ready = True
    with TestClient(app) as client:
        for method, path in ROUTES:
            response = client.request(
                method, re.sub(r"{\w+:path}", "mood", path).replace("{name}", "start.js"), content=b"{"
            )
            assert response.status_code == (200 if path in OPEN else 401), path
        assert error_of(response if path not in OPEN else client.get("/metrics"), 401)["type"] == "authentication_error"
        for header in ("", "Bearer", "Bearer wrong", "Basic s3cret-ключ", "s3cret-ключ"):
            assert client.get("/v1/models", headers={"Authorization": header.encode()}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer s3cret-ключ".encode()}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_no_key_no_exposure(host: str) -> None:
    with pytest.raises(PosteriorError, match="without a key"):
        check_exposure(host, Keys())
    check_exposure(host, Keys("key"))


def test_loopback_needs_no_key() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_exposure(host, Keys())


def test_not_ready_until_warm_and_not_healthy_without_an_engine(
    service: Service, engine: fakes.Engine, linearizer: fakes.Linearizer
) -> None:
    app = create_app(service, None)
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200
        for response in (client.get("/ready"), client.post("/v1/predictive", json=PREDICT)):
            assert error_of(response, 503) and "retry-after" in response.headers
        app.state.ready = True
        assert client.get("/ready").status_code == 200
        linearizer.problem = Unavailable("the linearised predictive is starting again")
        response = client.get("/ready")
        assert error_of(response, 503)["message"] == "the server is not ready; try again shortly"
        assert "retry-after" in response.headers
        assert client.get("/health").status_code == 200
        assert client.post("/v1/predictive", json=PREDICT).status_code == 200, "the mixture is answered all the same"
        linearizer.problem = None
        assert client.get("/ready").status_code == 200
        engine.living = False
        assert error_of(client.get("/health"), 503) and error_of(client.get("/ready"), 503)


def test_metrics_count_requests_tokens_and_answers(client: TestClient) -> None:
    client.post("/v1/predictive", json={**PREDICT, "inputs": [{"text": "good"}, {"text": "bad"}]})
    client.post("/v1/predictive", json={"model": "x" * 50})
    client.post(
        "/v1/chat/completions", json={"model": "mood", "messages": [{"role": "user", "content": "x"}], "stream": True}
    )
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'posterior_requests_total{endpoint="predictive",posterior="gang",predictive="mixture",status="200"} 1.0',
        'posterior_requests_total{endpoint="predictive",posterior="none",predictive="none",status="400"} 1.0',
        'posterior_requests_total{endpoint="chat",posterior="mood",predictive="mixture",status="200"} 1.0',
        'posterior_prompt_tokens_total{posterior="gang"} 29.0',
        'posterior_generated_tokens_total{posterior="mood"} 1.0',
        'posterior_answers_total{posterior="gang",predictive="mixture"} 2.0',
        'posterior_confidence_count{posterior="gang",predictive="mixture"} 2.0',
        'posterior_epistemic_entropy_nats_count{posterior="gang",predictive="mixture"} 2.0',
        'posterior_total_entropy_nats_count{posterior="gang",predictive="mixture"} 2.0',
        'posterior_token_epistemic_entropy_nats_count{posterior="mood"} 1.0',
        'posterior_effective_particles_ratio_count{posterior="mood"} 1.0',
        'posterior_gang_resumes_total{posterior="mood"} 0.0',
        'posterior_info{base="tiny-base",family="laplace",hash="abcdef0123456789",posterior="mood"} 1.0',
    ):
        assert line in lines, line
    assert not any("x" * 50 in line for line in lines), "names that clients make up never become labels"


@pytest.mark.asyncio
async def test_a_client_that_leaves_cancels_its_work(service: Service, engine: fakes.Engine) -> None:
    app = create_app(service, None)
    app.state.ready = True
    engine.delay = 60.0
    body = json.dumps(PREDICT).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/predictive",
        "raw_path": b"",
        "query_string": b"",
        "headers": [],
    }
    await asyncio.wait_for(app({**scope, "http_version": "1.1", "scheme": "http", "root_path": ""}, receive, send), 5)
    assert engine.cancelled == 1
    assert 'status="499"' in service.metrics.text().decode()
