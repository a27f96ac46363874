"""Ids of requests, in and out; the line of each in the log; pages of other origins."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.access.keys import Keys
from server.http.app import create_app
from server.services.predictive import Service

PREDICT = {"model": "gang", "inputs": [{"text": "a secret prompt"}]}
TEXT = {"model": "gang", "prompt": "a secret prompt", "max_tokens": 1}
MADE = re.compile("[0-9a-f]{32}")
KEY = {"Authorization": "Bearer s3cret"}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """What is logged of each request, when it is asked for."""
    caplog.set_level(logging.INFO, logger="posterior.access")

    def found() -> list[dict[str, Any]]:
        return [vars(record)["fields"] for record in caplog.records if record.name == "posterior.access"]

    return found


def served(service: Service, **options: Any) -> TestClient:
    app = create_app(service, Keys("s3cret"), **options)
    app.state.ready = True
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def keyed(service: Service) -> Iterator[TestClient]:
    with served(service) as client:
        yield client


ANSWERS = [
    ("GET", "/health", None, 200), ("GET", "/v1/models", None, 200), ("GET", "/v1/nothing", None, 404),
    ("PATCH", "/v1/models", None, 405), ("POST", "/v1/predictive", PREDICT, 200), ("POST", "/v1/predictive", {}, 400),
    ("POST", "/v1/completions", TEXT | {"stream": True}, 200),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "body", "status"), ANSWERS)
def test_every_answer_has_the_id_that_its_client_gave_or_a_new_one(
    keyed: TestClient, method: str, path: str, body: Any, status: int
) -> None:
    for given, expected in (({}, MADE), ({"X-Request-Id": "mine-1.a:b_C"}, re.compile("mine-1.a:b_C"))):
        response = keyed.request(method, path, json=body, headers=KEY | given)
        assert response.status_code == status
        assert len(response.headers.get_list("x-request-id")) == 1
        assert expected.fullmatch(response.headers["x-request-id"])


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "a\tb", "ü"])
def test_an_id_that_is_not_sane_is_replaced(keyed: TestClient, given: str) -> None:
    response = keyed.get("/health", headers={"X-Request-Id": given.encode()})
    assert response.status_code == 200 and MADE.fullmatch(response.headers["x-request-id"])


def test_without_a_key_and_after_a_fault_there_is_an_id_too(
    keyed: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch, lines: Any
) -> None:
    assert MADE.fullmatch(keyed.get("/v1/models").headers["x-request-id"])
    monkeypatch.setattr(service.metrics, "text", lambda: 1 / 0)
    response = keyed.get("/metrics", headers=KEY)
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    assert [(line["status"], line["route"]) for line in lines()] == [(401, "/v1/models"), (500, "/metrics")]
    assert lines()[1]["request_id"] == response.headers["x-request-id"]


def test_a_line_says_what_was_asked_and_nothing_of_the_prompt(keyed: TestClient, lines: Any) -> None:
    keyed.post("/v1/predictive", json=PREDICT, headers=KEY | {"X-Request-Id": "mine"})
    keyed.post("/v1/completions", json=TEXT, headers=KEY)
    keyed.post("/v1/completions", json=TEXT | {"model": "tiny-base"}, headers=KEY)
    keyed.post("/v1/completions", json=TEXT | {"model": "made up"}, headers=KEY)
    keyed.get("/ready")
    keyed.get("/v1/etc/passwd%0Aforged")
    choice, text, base, unknown, lost = lines()
    expected = {"request_id": "mine", "method": "POST", "route": "/v1/predictive", "status": 200, "key": "default"}
    expected |= {"model": "gang", "predictive": "mixture"}
    assert expected.items() <= choice.items() and choice["tokens"] > 0 and 0 <= choice["seconds"] < 10
    assert (text["route"], text["tokens"]) == ("/v1/completions", 4)
    assert (base["model"], unknown["model"], unknown["status"]) == ("tiny-base", "none", 404)
    assert lost["route"] == "unknown" and lost["status"] == 404
    assert "secret prompt" not in str(lines()) and "body" not in choice


def test_prompts_are_logged_on_request(service: Service, lines: Any) -> None:
    with served(service, log_prompts=True) as client:
        client.post("/v1/predictive", json=PREDICT, headers=KEY)
        client.post("/v1/predictive", json=PREDICT | {"x": "y" * 10**6}, headers=KEY)
    short, long = lines()
    assert "a secret prompt" in short["body"] and len(long["body"]) == 65536


def test_a_stream_that_breaks_off_is_logged_with_its_error(
    keyed: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch, lines: Any
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        yield 'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}], "id": "x"}\n\n'
        raise RuntimeError

    async def complete(*_: Any, **__: Any) -> Any:
        return broken()

    monkeypatch.setattr(service.engine, "complete", complete)
    assert keyed.post("/v1/completions", json=TEXT | {"stream": True}, headers=KEY).status_code == 200
    assert [line["status"] for line in lines()] == [500]


def test_vllm_gets_an_id_of_its_own_for_each_request_and_no_other_header(keyed: TestClient, calls: list[Any]) -> None:
    for _ in range(2):
        headers = {"X-Request-Id": "mine", "X-data-parallel-rank": "7"}
        assert keyed.post("/v1/completions", json=TEXT, headers=KEY | headers).status_code == 200
    given = [dict(call.headers) for call in calls]
    assert all(each.keys() == {"x-request-id"} for each in given)
    first, second = (each["x-request-id"] for each in given)
    assert first != second and re.fullmatch("mine-[0-9a-f]{8}", first) and re.fullmatch("mine-[0-9a-f]{8}", second)


def test_more_requests_than_are_allowed_at_a_time_get_429(service: Service) -> None:
    app = create_app(service, None, most=1)
    app.state.ready = True
    app.state.running._work.add(object())
    with TestClient(app) as client:
        response = client.post("/v1/predictive", json=PREDICT)
        assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert client.get("/v1/models").status_code == 200
        app.state.running._work.clear()
        assert client.post("/v1/predictive", json=PREDICT).status_code == 200


PAGE = {"Origin": "https://page.example"}
PREFLIGHT = PAGE | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def test_pages_of_other_origins_are_kept_out_by_default(keyed: TestClient) -> None:
    assert keyed.options("/v1/predictive", headers=PREFLIGHT).status_code == 405
    assert "access-control-allow-origin" not in keyed.get("/health", headers=PAGE).headers


@pytest.mark.parametrize("origins", [("https://page.example", "https://b.example"), ("*",)])
def test_pages_of_the_origins_that_are_named_may_call(service: Service, origins: tuple[str, ...]) -> None:
    allowed = "*" if origins == ("*",) else "https://page.example"
    with served(service, origins=origins) as client:
        asked = client.options("/v1/predictive", headers=PREFLIGHT)
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == allowed
        assert "authorization" in asked.headers["access-control-allow-headers"]
        answer = client.post("/v1/predictive", json=PREDICT, headers=KEY | PAGE)
        assert answer.headers["access-control-allow-origin"] == allowed
        exposed = answer.headers["access-control-expose-headers"]
        assert "X-Request-Id" in exposed and "Retry-After" in exposed and "X-RateLimit-Remaining-Tokens" in exposed
        other = client.options("/v1/predictive", headers=PREFLIGHT | {"Origin": "https://other.example"})
        assert other.status_code == (200 if origins == ("*",) else 400)
        refused = client.post("/v1/predictive", json=PREDICT, headers=PAGE)
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == allowed
