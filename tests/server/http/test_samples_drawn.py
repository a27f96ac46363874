"""What samples may be drawn from, and how many: fields that are sent on, refusals and limits."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.http.sampling import N, ask, chat


def test_samples_are_drawn_from_the_mixture_as_it_is(client: TestClient, engine: fakes.Engine) -> None:
    body = {"max_tokens": 5, "stop": ["x"], "top_p": 1.0, "temperature": 1, "n": 1, "response_format": {"type": "text"}}
    assert ask(client, **body, seed=3, stream=True).status_code == 200
    (sent,) = engine.bodies
    assert {name: sent[name] for name in ("n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")} == {
        "n": N, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0
    }  # fmt: skip
    assert (sent["seed"], sent["stop"], sent["max_tokens"]) == (3, ["x"], 5)
    assert "stream" not in sent and "uncertainty" not in sent


FOREIGN: list[dict[str, Any]] = [
    {"n": 2}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"presence_penalty": 1}, {"frequency_penalty": 1},
    {"repetition_penalty": 1.1}, {"logit_bias": {"1": 2}}, {"allowed_token_ids": [1]}, {"bad_words": ["x"]},
    {"min_tokens": 1}, {"echo": True}, {"suffix": "x"}, {"structured_outputs": {"choice": ["a", "b"]}},
    {"response_format": {"type": "json_object"}},
]  # fmt: skip


@pytest.mark.parametrize("body", FOREIGN, ids=lambda body: next(iter(body)))
def test_fields_that_change_what_is_drawn_are_refused(
    client: TestClient, engine: fakes.Engine, body: dict[str, Any]
) -> None:
    for returned in ("meaning", "greedy"):
        error = error_of(ask(client, uncertainty={"return": returned}, **body), 400)
        assert "cannot be honoured beside 'samples'" in error["message"] and error["param"] == next(iter(body))
    assert engine.bodies == []


def test_tools_are_refused(client: TestClient) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert error_of(chat(client, tools=tools), 400)["param"] == "tools"


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"temperature": 0}, "temperature", "drawn at temperature 1"),
        ({"temperature": 0.7, "uncertainty": {"return": "greedy"}}, "temperature", "this is 0.7"),
        ({"temperature": 1, "uncertainty": {"return": "greedy"}}, "temperature", "the greedy text at 0"),
        ({"uncertainty": {"answers": ["a", "b"]}}, "uncertainty", "belong to text"),
        ({"uncertainty": {"mixing": "token"}}, "uncertainty.mixing", "'sequence' mixing"),
        ({"uncertainty": {"samples": 1}}, "uncertainty.samples", "greater than or equal to 2"),
        ({"uncertainty": {"samples": 65}}, "uncertainty.samples", "less than or equal to 64"),
        ({"uncertainty": {"samples": "5"}}, "uncertainty.samples", "valid integer"),
        ({"uncertainty": {"return": "best"}}, "uncertainty.return", "'meaning' or 'greedy'"),
        ({"uncertainty": {"returned": "greedy"}}, "uncertainty.returned", "unknown field"),
        ({"uncertainty": {"meaning": "vibes"}}, "uncertainty.meaning", "'exact', 'embedding', 'nli' or 'judge'"),
        ({"uncertainty": {"samples": None, "return": "greedy"}}, "uncertainty.return", "belongs to 'samples'"),
        ({"uncertainty": {"samples": None, "meaning": "exact"}}, "uncertainty.meaning", "belongs to 'samples'"),
        ({"model": "tiny-base"}, "uncertainty.samples", "the base alone"),
        ({"model": "mood/map", "uncertainty": {"particles": 2}}, "uncertainty.predictive", "one adapter"),
        ({"uncertainty": {"predictive": "linearized"}}, "uncertainty.predictive", "not served yet"),
    ],
)
def test_refusals(client: TestClient, engine: fakes.Engine, body: dict[str, Any], param: str, words: str) -> None:
    error = error_of(ask(client, **body), 400)
    assert words in error["message"] and error["param"] == param, error
    assert engine.bodies == []


def test_decisions_and_predictives_know_no_samples(client: TestClient) -> None:
    body = {"model": "gang", "inputs": [{"text": "x"}], "samples": 2}
    assert "unknown field" in error_of(client.post("/v1/predictive", json=body), 400)["message"]


LIMITS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ["x"] * 256}, "256 prompts x 11 samples x 3 particles are 8448 sequences", "uncertainty.samples"),
    (
        {"prompt": ["x"] * 256, "uncertainty": {"samples": 10, "return": "greedy"}},
        "256 prompts x (10 samples + 1 greedy text) x 3 particles are 8448 sequences",
        "uncertainty.samples",
    ),
    (
        {"max_tokens": 40_000},
        "1 prompts x 11 samples x 3 particles x 40000 tokens, the most that a text may have, are 1320000",
        "max_tokens",
    ),
]


@pytest.mark.parametrize(("body", "words", "param"), LIMITS)
def test_limits_are_checked_before_anything_is_begun(
    client: TestClient, engine: fakes.Engine, body: dict[str, Any], words: str, param: str
) -> None:
    engine.max_model_len = 2**17
    error = error_of(ask(client, samples=11, **body), 400)
    assert words in error["message"] and error["param"] == param and engine.bodies == []
    assert "'max_tokens'" in error["message"] or "fewer prompts" in error["message"]


def test_a_length_that_is_left_open_counts_as_what_it_may_become(client: TestClient, engine: fakes.Engine) -> None:
    engine.max_model_len = 2**17
    assert ask(client).status_code == 200, "a completion has 16 tokens"
    assert "x 131072 tokens" in error_of(ask(client, max_tokens=None), 400)["message"]
    assert "x 131072 tokens" in error_of(chat(client), 400)["message"]
    assert chat(client, max_completion_tokens=50).status_code == 200
    engine.max_model_len = 64
    assert ask(client, max_tokens=2**20).status_code == 200, "vLLM says what does not fit"
