"""Several keys over HTTP: whose models they see, what they may use a minute, and what is counted of them."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient
from posterior_client import PosteriorClient, RateLimitError

from server.access.keys import Key, Keys
from server.http import managing
from server.http.app import ADMIN, create_app
from server.services.predictive import Service
from tests.clients.conftest import serving
from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.http.asking import INPUT, LATE, QUESTIONS

As = Callable[[str], TestClient]
MESSAGES: list[Any] = [{"role": "user", "content": "good?"}]
NOUL = {"late": {"type": "noul", "instructions": "Was it late?"}}
CHAT: tuple[str, dict[str, Any]] = ("/v1/chat/completions", {"messages": MESSAGES})
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/predictive", {"inputs": [{"text": "good"}]}),
    ("/v1/decisions", {"input": INPUT, "questions": QUESTIONS}),
    ("/v1/systemone", {"state": INPUT, "questions": NOUL}),
    CHAT,
    ("/v1/chat/completions", {"messages": MESSAGES, "uncertainty": {"answers": [" no", " yes"]}}),
    ("/v1/chat/completions", {"messages": MESSAGES, "uncertainty": {"samples": 3}}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
]
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def engine() -> fakes.Engine:
    return fakes.Engine(max_model_len=4096)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Keys that are their names."""
    rights = {
        "all": "",
        "mood": 'models = ["mood"]',
        "map": 'models = ["mood/map"]',
        "none-of-them": "models = []\nadmin = true",
        "two": "requests_per_minute = 2",
        "few": "tokens_per_minute = 20",
        "often": "requests_per_minute = 60",
    }
    text = "".join(f'[keys.{name}]\nsha256 = "{hash_of(name)}"\n{right}\n' for name, right in rights.items())
    (tmp_path / "keys.toml").write_text(text)
    return tmp_path / "keys.toml"


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys(file: Path) -> Keys:
    return Keys("own", file)


@pytest.fixture
def app(service: Service, keys: Keys) -> Any:
    app = create_app(service, keys)
    app.state.ready = True
    return app


@pytest.fixture
def by(app: Any) -> Iterator[As]:
    """A client that shows this key."""
    with TestClient(app, raise_server_exceptions=False) as client:

        def show(key: str) -> TestClient:
            client.headers["Authorization"] = f"Bearer {key}"
            return client

        yield show


def ids(client: TestClient) -> list[str]:
    return [card["id"] for card in client.get("/v1/models").json()["data"]]


def found(keys: Keys, name: str) -> Key:
    key = keys.find(name.encode())
    assert key is not None
    return key


def counted(service: Service, line: str) -> float:
    values = [
        float(each.rpartition(" ")[2]) for each in service.metrics.text().decode().splitlines() if each.startswith(line)
    ]
    return sum(values)


# Models


def test_a_key_sees_its_models_only(by: As) -> None:
    assert ids(by("own")) == ids(by("all")) == ["tiny-base", "mood", "mood/map", "gang", "gang/map"]
    assert ids(by("mood")) == ["mood", "mood/map"] and ids(by("map")) == ["mood/map"] and ids(by("none-of-them")) == []
    for name, allowed in (
        ("mood", 200),
        ("mood/map", 200),
        ("mood@abcdef012345", 200),
        ("gang", 404),
        ("tiny-base", 404),
    ):
        assert by("mood").get(f"/v1/models/{name}").status_code == allowed
    assert by("map").get("/v1/models/mood").status_code == 404


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_a_model_of_others_is_like_one_that_is_not_there(
    by: As, engine: fakes.Engine, path: str, body: dict[str, Any]
) -> None:
    said = []
    for name in ("gang", "nobody", "gang/map", "gang@abcdef012345", "tiny-base"):
        error = error_of(by("mood").post(path, json={"model": name, **body}), 404)
        said.append(json.dumps(error).replace(name, "NAME"))
    assert len(set(said)) == 1 and '"model_not_found"' in said[0]
    assert engine.bodies == [] == engine.scored
    assert by("mood").post(path, json={"model": "mood", **body}).status_code == 200
    assert by("all").post(path, json={"model": "gang", **body}).status_code == 200


def test_the_default_model_of_a_route_needs_the_right_too(by: As) -> None:
    body = {"state": INPUT, "questions": NOUL}
    assert by("all").post("/v1/systemone", json=body).status_code == 200
    assert error_of(by("mood").post("/v1/systemone", json=body), 404)["code"] == "model_not_found"


# Routes


def test_only_an_admin_reads_the_metrics(by: As) -> None:
    assert by("own").get("/metrics").status_code == 200 == by("none-of-them").get("/metrics").status_code
    error = error_of(by("mood").get("/metrics"), 403)
    assert (error["type"], error["code"]) == ("authentication_error", "admin_required")
    for path in ("/version", "/openapi.json", "/v1/models"):
        assert by("mood").get(path).status_code == 200 and by("wrong").get(path).status_code == 401


def test_the_description_has_what_a_key_meets(by: As) -> None:
    paths = by("mood").get("/openapi.json").json()["paths"]
    for path, item in paths.items():
        for method, operation in item.items():
            responses = operation["responses"]
            assert "429" in responses or method != "post" or path in managing.PATHS
            assert ("403" in responses) == (path in ADMIN)
            assert ("401" in responses) == ("security" not in operation)
            for status in {"429", "503"} & responses.keys():
                assert "Retry-After" in responses[status]["headers"]


def test_a_key_that_is_taken_away_opens_nothing_more(by: As, keys: Keys, file: Path) -> None:
    assert by("mood").get("/v1/models").status_code == 200
    file.write_text(f'[keys.new]\nsha256 = "{hash_of("new")}"\n')
    assert by("mood").get("/v1/models").status_code == 200, "the file is read when that is asked for"
    keys.reload()
    assert by("mood").get("/v1/models").status_code == 401
    assert by("new").get("/v1/models").status_code == 200 == by("own").get("/v1/models").status_code


# Requests and tokens a minute


def test_a_key_that_has_used_its_requests_waits(by: As, engine: fakes.Engine, service: Service) -> None:
    path, body = CHAT
    replies = [by("two").post(path, json={"model": "mood", **body}) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429] and len(engine.bodies) == 2
    error = error_of(replies[2], 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "2 requests a minute; try again in 30 s" in error["message"]
    assert replies[2].headers["retry-after"] == "30"
    remaining = [reply.headers["x-ratelimit-remaining-requests"] for reply in replies]
    assert remaining == ["1", "0", "0"] and replies[0].headers["x-ratelimit-limit-requests"] == "2"
    assert by("two").post(path, content=b"no JSON").status_code == 429, "before the body is looked at"
    assert by("two").get("/v1/models").status_code == 200, "what takes no work has no limit"
    assert by("own").post(path, json={"model": "mood", **body}).status_code == 200
    assert counted(service, 'posterior_key_requests_total{key="two",status="429"}') == 2


def test_refused_requests_count_as_requests(by: As) -> None:
    assert [by("two").post(CHAT[0], json={}).status_code for _ in range(3)] == [404, 404, 429]


def test_a_server_that_is_not_ready_counts_nothing(by: As, app: Any) -> None:
    app.state.ready = False
    for _ in range(3):
        response = by("two").post(CHAT[0], json={"model": "mood", **CHAT[1]})
        assert response.status_code == 503 and "retry-after" in response.headers
    app.state.ready = True
    assert by("two").post(CHAT[0], json={"model": "mood", **CHAT[1]}).headers["x-ratelimit-remaining-requests"] == "1"


def total(usage: dict[str, Any]) -> int:
    return int(usage.get("total_tokens") or usage["input_tokens"] + usage["output_tokens"])


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_tokens_are_counted_as_usage_says(by: As, service: Service, path: str, body: dict[str, Any]) -> None:
    reply = by("few").post(path, json={"model": "mood", **body})
    used = total(reply.json()["usage"])
    assert used > 0 and counted(service, 'posterior_key_tokens_total{key="few"}') == used
    assert reply.headers["x-ratelimit-limit-tokens"] == "20"
    assert int(reply.headers["x-ratelimit-remaining-tokens"]) == max(20 - used, 0)
    again = by("few").post(path, json={"model": "mood", **body})
    assert again.status_code == (200 if used < 20 else 429)
    if used >= 20:
        assert error_of(again, 429)["message"].startswith("this key may use 20 tokens a minute; try again in ")
        assert int(again.headers["retry-after"]) == pytest.approx((used - 19) * 3, abs=1)


@pytest.mark.parametrize("uncertainty", [None, {"answers": [" no", " yes"]}, {"samples": 3}])
def test_the_tokens_of_a_stream_are_counted_at_its_end(by: As, service: Service, uncertainty: Any) -> None:
    path, body = CHAT
    reply = by("few").post(path, json={"model": "mood", **body, **STREAMED, "uncertainty": uncertainty})
    assert reply.status_code == 200 and "x-ratelimit-remaining-tokens" in reply.headers
    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    used = counted(service, 'posterior_key_tokens_total{key="few"}')
    assert used == total(chunks[-1]["usage"]) > 0


@pytest.mark.asyncio
async def test_a_stream_that_its_client_leaves_is_counted_by_its_events(app: Any, service: Service, keys: Keys) -> None:
    class Endless(fakes.Engine):
        async def _write(self, *args: Any) -> Any:
            async def events() -> Any:
                while True:
                    yield 'data: {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": null}]}\n\n'
                    await asyncio.sleep(0)

            return events()

    service.engine = Endless()
    body = json.dumps({"model": "tiny-base", "messages": MESSAGES, "stream": True}).encode()
    sent: list[Any] = []
    arrived = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        while not arrived and len(sent) < 12:
            await asyncio.sleep(0)
        return arrived.pop() if arrived else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": CHAT[0], "raw_path": b"", "query_string": b"", "root_path": "",
        "headers": [(b"authorization", b"Bearer often")], "http_version": "1.1", "scheme": "http",
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 10)
    for _ in range(100):
        await asyncio.sleep(0.01)
        if counted(service, 'posterior_key_requests_total{key="often",status="499"}'):
            break
    used = counted(service, 'posterior_key_tokens_total{key="often"}')
    assert used == pytest.approx(len(sent) - 1, abs=2) and used >= 10
    assert counted(service, 'posterior_generated_tokens_total{posterior="none"}') == used


def test_the_sdk_waits_as_long_as_it_is_told(app: Any, keys: Keys, service: Service) -> None:
    often = found(keys, "often")
    often.quota.spend("requests", 60)
    with serving(app) as url, openai.OpenAI(base_url=url, api_key="often", max_retries=1) as client:
        reply = client.chat.completions.create(model="mood", messages=MESSAGES)
        assert reply.choices[0].message.content == "hello"
        assert counted(service, 'posterior_key_requests_total{key="often",status="429"}') == 1
        often.quota.spend("requests", 60)
        with pytest.raises(openai.RateLimitError, match="60 requests a minute") as caught:
            client.with_options(max_retries=0).chat.completions.create(model="mood", messages=MESSAGES)
        with PosteriorClient(url, "often", max_retries=0) as own, pytest.raises(RateLimitError, match="60 requests"):
            own.predictive(model="mood", inputs=[{"text": "good"}])
    assert caught.value.code == "rate_limit_exceeded" and int(caught.value.response.headers["retry-after"]) > 1


# Metrics


def test_requests_are_counted_by_key(by: As, service: Service) -> None:
    question = {"model": "mood", "input": INPUT, "questions": [LATE]}
    by("mood").post("/v1/decisions", json=question)
    by("mood").post("/v1/decisions", json=question | {"model": "gang"})
    by("own").post("/v1/decisions", json={"model": "mood"})
    by("x" * 50).post("/v1/decisions", json=question)
    by("x" * 50).get("/v1/models")
    by("mood").get("/metrics")
    by("mood").get("/v1/models")
    lines = [
        line for line in by("own").get("/metrics").text.splitlines() if line.startswith("posterior_key_requests_t")
    ]
    assert sorted(lines) == [
        'posterior_key_requests_total{key="default",status="400"} 1.0',
        'posterior_key_requests_total{key="mood",status="200"} 1.0',
        'posterior_key_requests_total{key="mood",status="403"} 1.0',
        'posterior_key_requests_total{key="mood",status="404"} 1.0',
        'posterior_key_requests_total{key="none",status="401"} 2.0',
    ]
    assert "x" * 50 not in service.metrics.text().decode(), "what clients make up never becomes a label"


def test_without_keys_nothing_is_limited_or_counted(client: TestClient, service: Service) -> None:
    response = client.post(CHAT[0], json={"model": "mood", **CHAT[1]})
    assert response.status_code == 200 and not [name for name in response.headers if name.startswith("x-ratelimit")]
    assert counted(service, "posterior_key_") == 0 and client.get("/metrics").status_code == 200
