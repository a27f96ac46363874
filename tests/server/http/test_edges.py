"""The same request has the same meaning with and without `answers`; what is not JSON is one line; streams are not held
back; models are found by what answers call them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from posterior.errors import PosteriorError
from server.access.exposure import check_exposure
from server.access.keys import Keys, secret
from server.http.app import create_app
from server.services.predictive import Service
from tests.server import fakes
from tests.server.conftest import error_of

CHAT, COMPLETIONS, PREDICTIVE = "/v1/chat/completions", "/v1/completions", "/v1/predictive"
MESSAGES = [{"role": "user", "content": "good?"}]
ANSWERS = {"answers": [" negative", " positive"]}


def chat(client: TestClient, **body: Any) -> Any:
    return client.post(CHAT, json={"model": "mood", "messages": MESSAGES, **body})


# An empty key is no key


@pytest.mark.parametrize("key", [None, "", " ", "\n"])
def test_an_empty_key_protects_no_address(key: str | None) -> None:
    assert secret(key) is None
    with pytest.raises(PosteriorError, match="without a key"):
        check_exposure("0.0.0.0", Keys(secret(key)))


@pytest.mark.parametrize("key", ["", " ", "key "])
def test_no_server_takes_an_empty_key(key: str) -> None:
    with pytest.raises(PosteriorError, match="empty"):
        Keys(key)


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Bearer  ", "bearer\t"])
def test_an_empty_token_opens_nothing(service: Service, header: str) -> None:
    app = create_app(service, Keys("s3cret"))
    app.state.ready = True
    with TestClient(app) as client:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/version"):
            assert client.get(path, headers={"Authorization": header}).status_code == 401


@pytest.mark.parametrize("key", ["k\nx", "k\x00", "k\udce4", "k\x7f"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(PosteriorError, match="no header can carry"):
        secret(key)


def test_nobody_is_sent_elsewhere_before_the_key(service: Service) -> None:
    with TestClient(create_app(service, Keys("s3cret"))) as client:
        for path in ("/v1/predictive/", "/metrics/", "/health/", "/docs//"):
            response = client.post(path, headers={"Host": "evil.example"}, follow_redirects=False)
            assert response.status_code in (404, 405) and "location" not in response.headers


# What is no JSON


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, PREDICTIVE])
@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "mood", "prompt": "\\ud83d"}', b'{"model": "\\udc00"}', b'{"a": ["\\ud83d"]}', b'{"\\ud83d": 1}',
        b'{"a": "\xed\xa0\xbd"}', b'{"a": "caf\xe9"}', '{"a": "é"}'.encode("utf-16"), b'{"temperature": 1e999}',
        b'{"temperature": NaN}', b'{"temperature": -Infinity}', b"[" * 100_000, b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b'{"model": "mood", "model": "gang"}', b'{"a": [{"b": 1, "b": 1}]}',
        b"", b"null", b"[]", b'"x"', b'{"n": ' + b"9" * 10_000 + b"}", b"\x00", b'{"a": 1} {"b": 2}',
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_one_line(client: TestClient, path: str, body: bytes) -> None:
    assert "JSON" in error_of(client.post(path, content=body), 400)["message"]


def test_a_key_that_is_there_twice_is_named(client: TestClient) -> None:
    body = b'{"model": "mood", "inputs": [{"text": "bad", "text": "good"}]}'
    assert "the key 'text' is there twice; keep one" in error_of(client.post(PREDICTIVE, content=body), 400)["message"]


def test_two_halves_of_a_character_are_one(client: TestClient) -> None:
    body = b'{"model": "mood", "inputs": [{"text": "\\ud83d\\ude00"}]}'
    assert client.post(PREDICTIVE, content=body).status_code == 200


# The same check with and without answers

WRONG = [
    ({"stream_options": True}, "stream_options"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"temperature": "hot"}, "temperature"),
    ({"seed": 2**70}, "seed"),
    ({"tools": {}}, "tools"),
    ({"logprobs": 3}, "logprobs"),
    ({"stop": [1]}, "stop.0"),
    ({"chat_template_kwargs": {"a": {}}}, "chat_template_kwargs.a"),
    ({"messages": ["hi"]}, "messages.0"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "messages"),
    *(({"messages": [{"role": "user", "content": wrong}]}, "messages") for wrong in ({"a": 1}, 5, [{"type": "text"}])),
    *(
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": wrong}}]}]},
            "messages",
        )
        for wrong in ("{", "[1]", "[" * 3000)
    ),
]


@pytest.mark.parametrize("uncertainty", [None, ANSWERS], ids=["text", "answers"])
@pytest.mark.parametrize(("body", "param"), WRONG, ids=[json.dumps(body) for body, _ in WRONG])
def test_wrong_fields_are_refused_whatever_is_asked(
    client: TestClient, body: dict[str, Any], param: str, uncertainty: dict[str, Any] | None
) -> None:
    assert error_of(chat(client, uncertainty=uncertainty, **body), 400)["param"] == param


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "tool_calls": [{}]}, "message 1: each of the 'tool_calls' must be"),
        (
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            "message 1: each of the 'tool_calls' needs an 'id'",
        ),
        ({"role": "user", "content": {"a": 1}}, "message 1: the 'content' must be a text or a list of text parts"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "message 1: each part of the 'content' must be"),
        ({"role": "user"}, "message 1: every message needs a 'role' and a 'content'"),
    ],
)
def test_what_is_wrong_with_a_message_is_said_of_that_message(
    client: TestClient, message: dict[str, Any], words: str
) -> None:
    assert error_of(chat(client, messages=[*MESSAGES, message]), 400)["message"].startswith(words)


@pytest.mark.parametrize("prompt", [["a", [1]], [[1], "a"], [1, "a"], [], [[]], {"a": 1}, 5])
def test_prompts_of_two_kinds_are_refused_by_what_is_expected(client: TestClient, prompt: Any) -> None:
    error = error_of(client.post(COMPLETIONS, json={"model": "mood", "prompt": prompt}), 400)
    assert error["param"] == "prompt" and "must be a text, a list of token ids, or a list of" in error["message"]


def test_what_a_client_wrote_is_not_repeated_at_length(client: TestClient) -> None:
    long = "a" * 20_000
    for asked in ({"model": long}, {"model": "mood", "answers": [long, long]}):
        response = client.post(PREDICTIVE, json={"inputs": [{"text": "x"}], **asked})
        message = response.json()["error"]["message"]
        assert response.status_code in (400, 404) and len(message) < 2000 and " ... " in message


UNHONOURED = [
    {"logprobs": True}, {"top_logprobs": 2}, {"echo": True}, {"response_format": {"type": "json_object"}},
    {"tool_choice": "required"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, {"top_p": 0.5},
    {"top_k": 3}, {"min_p": 0.1}, {"stop": ["x"]}, {"stop": "x"}, {"logit_bias": {"1": 2.0}}, {"min_tokens": 2},
    {"presence_penalty": 1.0}, {"frequency_penalty": -1.0}, {"repetition_penalty": 1.1}, {"ignore_eos": True},
    {"stop_token_ids": [3]}, {"allowed_token_ids": [3]}, {"bad_words": ["x"]}, {"return_token_ids": True},
    {"structured_outputs": {"choice": ["a"]}}, {"max_tokens": 3}, {"max_completion_tokens": 3},
]  # fmt: skip


@pytest.mark.parametrize("body", UNHONOURED, ids=map(json.dumps, UNHONOURED))
def test_what_a_choice_among_answers_cannot_honour_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    assert error_of(chat(client, uncertainty=ANSWERS, **body), 400)["param"] == next(iter(body))


NEUTRAL = [
    {"logprobs": False, "top_logprobs": 0, "echo": False, "tools": None, "tool_choice": "auto", "stop": []},
    {"response_format": {"type": "text"}, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    {"presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "min_tokens": 0, "ignore_eos": False},
    {"max_tokens": 9, "user": "u", "parallel_tool_calls": False, "skip_special_tokens": False, "seed": -1},
    {"no_field_of_anybody": {"a": 1}},
]


@pytest.mark.parametrize("body", NEUTRAL, ids=map(json.dumps, NEUTRAL))
def test_values_that_change_nothing_pass(client: TestClient, body: dict[str, Any]) -> None:
    assert chat(client, uncertainty=ANSWERS, **body).status_code == 200
    assert chat(client, **body).status_code == 200


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-9])
def test_the_coldest_temperature_gives_the_most_probable_answer(client: TestClient, temperature: float) -> None:
    best = chat(client, uncertainty=ANSWERS).json()["choices"][0]["message"]["content"]
    drawn = chat(client, uncertainty=ANSWERS, temperature=temperature, n=8).json()["choices"]
    assert {choice["message"]["content"] for choice in drawn} == {best}


@pytest.mark.parametrize("body", [{"mixing": "token"}, {"tokens": True}, {"tokens": False}])
def test_what_belongs_to_text_is_refused_by_the_predictive(client: TestClient, body: dict[str, Any]) -> None:
    response = client.post(PREDICTIVE, json={"model": "mood", "inputs": [{"text": "x"}], **body})
    assert "belong to text" in error_of(response, 400)["message"]


# Streams and models


@pytest.mark.parametrize("uncertainty", [None, ANSWERS], ids=["text", "answers"])
def test_no_proxy_holds_a_stream_back(client: TestClient, uncertainty: dict[str, Any] | None) -> None:
    headers = chat(client, stream=True, uncertainty=uncertainty).headers
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")


def test_models_are_found_by_what_answers_call_them(client: TestClient) -> None:
    for model, known in (("mood", "mood@abcdef012345"), ("mood/map", "mood/map@abcdef012345"), ("tiny-base",) * 2):
        for uncertainty in (None, ANSWERS):
            named = chat(client, model=model, uncertainty=uncertainty).json()["model"]
            assert named == known
            again = chat(client, model=named, uncertainty=uncertainty).json()
            assert again["model"] == named
            if model != "tiny-base":
                assert again["choices"][0]["uncertainty"]["posterior"] == "mood@abcdef012345"
        card = client.get(f"/v1/models/{known}").json()
        assert (card["id"], card["root"], card["max_model_len"]) == (model, known, fakes.Engine.max_model_len)
    for nobody in ("mood@", "mood@abcdef012346", "mood/map@", "@abcdef012345", "tiny-base@abcdef012345"):
        assert error_of(client.get(f"/v1/models/{nobody}"), 404) and error_of(chat(client, model=nobody), 404)


def test_a_slash_at_the_end_changes_nothing(client: TestClient) -> None:
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()
    assert client.get("/v1/models/mood/").json() == client.get("/v1/models/mood").json()


# The description of the API


def test_every_route_is_described_and_only_with_the_key(service: Service) -> None:
    with TestClient(create_app(service, Keys("s3cret"))) as client:
        assert error_of(client.get("/openapi.json"), 401)
        document = client.get("/openapi.json", headers={"Authorization": "Bearer s3cret"}).json()
        routes = {route.path.replace(":path", "") for route in client.app.routes}  # type: ignore[attr-defined]
        assert set(document["paths"]) == routes
        public = [p for p, item in document["paths"].items() if all(o.get("security") == [] for o in item.values())]
        assert set(public) == {"/health", "/ready", "/", "/web/{name}", "/docs", "/docs/{name}"}
        assert document["security"] == [{"key": []}]
        assert {"PredictiveRequest", "ChatRequest", "CompletionRequest", "PredictiveReply", "Error"} <= set(
            document["components"]["schemas"]
        )


def test_the_page_brings_all_it_needs_and_no_other_file(service: Service) -> None:
    with TestClient(create_app(service, Keys("s3cret"))) as client:
        page = client.get("/docs")
        assert page.status_code == 200 and "script-src 'self'" in page.headers["content-security-policy"]
        for name in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js", "start.css"):
            assert f"docs/{name}" in page.text
            assert len(client.get(f"/docs/{name}").content) > 100
        for name in ("index.html", "LICENSE.swagger-ui", "..%2fapp.py", "%2e%2e/app.py", "", "x" * 5000, "%00"):
            assert client.get(f"/docs/{name}", follow_redirects=False).status_code in (307, 404)
