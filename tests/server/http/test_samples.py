"""Chats and completions with samples, over a fake engine that writes what the test says."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.http.app import create_app
from server.services.predictive import Service
from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.fakes import Draft
from tests.server.http.sampling import DRAFTS, N, ask, chat
from tests.server.http.test_answers import events

WEIGHTS = (0.5, 0.3, 0.2)  # of the posterior "gang"
MEANINGS = {"paris": [1, 3, 4], "london": [0], "rome and": [2]}  # the numbers of their drafts


@pytest.fixture(autouse=True)
def drafts(engine: fakes.Engine) -> Iterator[None]:
    engine.drafts = DRAFTS
    yield


def by_hand() -> tuple[dict[str, float], float, float, list[float], dict[str, list[float]]]:
    """Of the drafts: the probability of each meaning, total and aleatoric entropy, the particles' weights, and
    p_k(meaning), by loops."""
    joint = {name: [0.0] * 3 for name in MEANINGS}
    for name, numbers in MEANINGS.items():
        for number in numbers:
            whole = [w * math.exp(sum(row[k] for row in DRAFTS[number].log_p)) for k, w in enumerate(WEIGHTS)]
            for k in range(3):
                joint[name][k] += whole[k] / sum(whole) / N
    probability = {name: sum(row) for name, row in joint.items()}
    weights = [sum(row[k] for row in joint.values()) for k in range(3)]
    each = {name: [row[k] / weights[k] for k in range(3)] for name, row in joint.items()}
    total = -sum(p * math.log(p) for p in probability.values())
    aleatoric = -sum(weights[k] * row[k] * math.log(row[k]) for row in each.values() for k in range(3))
    return probability, total, aleatoric, weights, each


def quantile(level: float, values: list[float], weights: list[float]) -> float:
    """The least value up to which the weights sum to the level."""
    pairs = list(zip(values, weights, strict=True))
    return min(value for value in values if sum(weight for other, weight in pairs if other <= value) >= level)


def logprob(number: int) -> float:
    """log p of a draft under the mixture."""
    return math.log(sum(w * math.exp(sum(r[k] for r in DRAFTS[number].log_p)) for k, w in enumerate(WEIGHTS)))


# What is said


@pytest.mark.parametrize("returned", ["meaning", "greedy"])
def test_meanings_equal_those_of_an_independent_loop(client: TestClient, returned: str) -> None:
    (choice,) = ask(client, uncertainty={"return": returned, "coverage": 0.5}).json()["choices"]
    record = choice["uncertainty"]["semantic"]
    probability, total, aleatoric, weights, each = by_hand()
    assert (record["samples"], record["truncated"], record["meaning"]) == (N, 1, "exact")
    assert record["entropy"] == pytest.approx({"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric})
    assert [meaning["text"] for meaning in record["meanings"]] == ["paris", "London", "Rome and"]
    for (name, numbers), meaning in zip(MEANINGS.items(), record["meanings"], strict=True):
        p = probability[name]
        assert p == pytest.approx(len(numbers) / N) == meaning["probability"] and meaning["samples"] == len(numbers)
        assert meaning["standard_error"] == pytest.approx(math.sqrt(p * (1 - p) / N))
        assert meaning["interval"] == pytest.approx([quantile(level, each[name], weights) for level in (0.25, 0.75)])
        spread = sum(w * (q - p) ** 2 for w, q in zip(weights, each[name], strict=True))
        assert meaning["variance"] == pytest.approx(spread / (1 - sum(w * w for w in weights)))
    assert record["effective_particles"] == pytest.approx(1 / sum(w * w for w in weights)) and "others" not in record


def test_the_returned_text_is_the_most_probable_sample_of_the_most_probable_meaning(client: TestClient) -> None:
    best = max(MEANINGS["paris"], key=logprob)
    assert best == 3, "not the first that was drawn"
    for body, text in ((ask(client).json(), "text"), (chat(client).json(), "content")):
        (choice,) = body["choices"]
        assert (choice.get("message") or choice)[text] == "paris" and choice["index"] == 0
        record = choice["uncertainty"]
        assert record["logprob"] == pytest.approx(logprob(best)) and record["mixing"] == "sequence"
        assert (record["semantic"]["returned"], record["semantic"]["own"]) == ("meaning", 0)
        written = sum(len(draft.log_p) for draft in DRAFTS)
        assert body["usage"]["completion_tokens"] == written and body["model"] == "gang@abcdef012345"


def test_of_equally_probable_meanings_the_one_with_the_most_probable_sample_comes_first(
    client: TestClient, engine: fakes.Engine
) -> None:
    engine.drafts = [Draft("a dog", [[-3.0] * 3]), Draft("a cat", [[-1.0] * 3]), Draft("a cow", [[-2.0] * 3])]
    record = ask(client, samples=3).json()["choices"][0]["uncertainty"]["semantic"]
    assert [meaning["text"] for meaning in record["meanings"]] == ["a cat", "a cow", "a dog"]
    assert record["entropy"] == pytest.approx({"total": math.log(3), "aleatoric": math.log(3), "epistemic": 0})


@pytest.mark.parametrize(("text", "own"), [("elsewhere", None), ("HELLO!", 1)])
def test_the_greedy_text_and_its_meaning(client: TestClient, engine: fakes.Engine, text: str, own: int | None) -> None:
    engine.drafts = [Draft("bye", [[-1.0] * 3]), Draft("bye", [[-1.0] * 3]), Draft(text, [[-1.0] * 3])]
    for send, field in ((ask, "text"), (chat, "content")):
        body = send(client, samples=3, uncertainty={"return": "greedy"}, seed=7, logprobs=True if send is chat else 1)
        (choice,) = body.json()["choices"]
        assert (choice.get("message") or choice)[field] == "hello"
        record = choice["uncertainty"]
        assert record["logprob"] == pytest.approx(math.log(0.5)), "of the greedy text"
        assert (record["semantic"]["returned"], record["semantic"]["own"]) == ("greedy", own)
        assert body.json()["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        greedy, drawn = sorted(engine.bodies[-2:], key=lambda sent: sent.get("n", 1))
        assert (greedy["temperature"], drawn["temperature"], drawn["n"], drawn["seed"]) == (0.0, 1.0, 3, 7)
        assert "logprobs" in greedy and "logprobs" not in drawn and "n" not in greedy


def test_several_prompts_have_their_own_meanings(client: TestClient) -> None:
    for returned, text in (("meaning", "paris"), ("greedy", "hello")):
        choices = ask(client, prompt=["x", "y"], uncertainty={"return": returned}).json()["choices"]
        assert [(choice["index"], choice["text"]) for choice in choices] == [(0, text), (1, text)]
        assert choices[0]["uncertainty"]["semantic"] == choices[1]["uncertainty"]["semantic"]


def test_many_meanings_are_cut_and_the_rest_is_summed(client: TestClient, engine: fakes.Engine) -> None:
    engine.drafts = [Draft(f"answer {i}", [[-1.0 - i / 100] * 3]) for i in range(25)]
    record = ask(client, samples=25).json()["choices"][0]["uncertainty"]["semantic"]
    assert [meaning["text"] for meaning in record["meanings"]] == [f"answer {i}" for i in range(20)]
    assert record["others"] == {"meanings": 5, "samples": 5, "probability": pytest.approx(0.2)}


def test_one_adapter_has_meanings_without_an_epistemic_part(client: TestClient) -> None:
    for body in ({"model": "gang/map"}, {"uncertainty": {"predictive": "map"}}, {"uncertainty": {"particles": 1}}):
        record = ask(client, **body).json()["choices"][0]["uncertainty"]
        assert (record["predictive"], record["particles"], record["semantic"]["samples"]) == ("map", 1, N)
        assert record["semantic"]["entropy"]["epistemic"] == 0 and record["semantic"]["entropy"]["total"] > 0


def test_the_record_keeps_what_a_text_has_without_samples(client: TestClient) -> None:
    options = {"tokens": True, "per_particle": True}
    (choice,) = ask(client, uncertainty=options).json()["choices"]
    record = choice["uncertainty"]
    assert len(record["tokens"]) == len(DRAFTS[3].log_p)
    assert record["per_particle"]["logprob"] == pytest.approx([-0.7, -2.5, -0.4])
    assert "semantic" not in chat(client, samples=None).json()["choices"][0]["uncertainty"]


def test_metrics_count_meanings_and_all_tokens(client: TestClient) -> None:
    ask(client)
    ask(client, uncertainty={"return": "greedy"})
    lines = client.get("/metrics").text.splitlines()
    written = 2 * sum(len(draft.log_p) for draft in DRAFTS) + 1
    for line in (
        'posterior_semantic_entropy_nats_count{posterior="gang"} 2.0',
        'posterior_semantic_epistemic_entropy_nats_count{posterior="gang"} 2.0',
        'posterior_token_epistemic_entropy_nats_count{posterior="gang"} 2.0',
        f'posterior_generated_tokens_total{{posterior="gang"}} {written}.0',
        'posterior_prompt_tokens_total{posterior="gang"} 6.0',
        'posterior_requests_total{endpoint="completions",posterior="gang",predictive="mixture",status="200"} 2.0',
    ):
        assert line in lines, line


# Streams


def said(chunk: Any) -> str:
    (choice,) = chunk["choices"]
    return (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""


@pytest.mark.parametrize("send", [ask, chat])
@pytest.mark.parametrize("returned", ["meaning", "greedy"])
def test_a_stream_says_the_same_as_the_whole(client: TestClient, send: Any, returned: str) -> None:
    options = {"return": returned, "tokens": True}
    whole = send(client, uncertainty=options, stream_options=None).json()
    options.pop("tokens")
    *chunks, usage = events(send(client, uncertainty=options, stream=True, stream_options={"include_usage": True}))
    assert "".join(map(said, chunks)) == {"meaning": "paris", "greedy": "hello"}[returned]
    records = [chunk["choices"][0].get("uncertainty", {}) for chunk in chunks]
    assert [record.get("semantic") for record in records[:-1]] == [None] * (len(chunks) - 1)
    expected = whole["choices"][0]["uncertainty"]
    tokens = [token for record in records for token in record.get("tokens", [])]
    assert {**records[-1], "tokens": tokens} == expected
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and chunks[0]["choices"][0]["finish_reason"] is None
    assert (usage["usage"], usage["choices"]) == (whole["usage"], [])
    assert {chunk["model"] for chunk in chunks} == {"gang@abcdef012345"}


def test_a_stream_without_records_of_tokens(client: TestClient) -> None:
    for returned in ("meaning", "greedy"):
        chunks = events(ask(client, stream=True, uncertainty={"tokens": False, "return": returned}))
        assert not any("tokens" in chunk["choices"][0].get("uncertainty", {}) for chunk in chunks)


def test_errors_of_the_samples_within_a_stream(
    client: TestClient, engine: fakes.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(seconds: None = None) -> None:
        raise RuntimeError("secret")

    engine.delay = 1.0
    monkeypatch.setattr(engine, "_wait", broken)
    text = ask(client, stream=True, uncertainty={"return": "greedy"}).text
    assert '"type": "server_error"' in text and "secret" not in text and "semantic" not in text
    assert error_of(ask(client, uncertainty={"return": "greedy"}), 500)
    assert error_of(ask(client), 500)


@pytest.mark.asyncio
@pytest.mark.parametrize(("returned", "stream"), [("meaning", True), ("greedy", False), ("greedy", True)])
async def test_a_client_that_leaves_ends_the_samples(
    service: Service, engine: fakes.Engine, returned: str, stream: bool
) -> None:
    app = create_app(service, None)
    app.state.ready = True
    engine.delay = 60.0
    options = {"samples": 2, "return": returned}
    body = json.dumps({"model": "gang", "prompt": "x", "uncertainty": options, "stream": stream}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None: ...

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b"",
        "headers": [], "http_version": "1.1", "scheme": "http", "root_path": "",
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 5)
    for _ in range(10):
        await asyncio.sleep(0)
    assert engine.cancelled == 1
