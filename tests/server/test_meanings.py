"""Samples and their meanings by a real server, against transformers + peft."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from posterior.meaning import Comparison
from posterior.meaning.embedding import Embedding
from posterior.meaning.exact import exact
from posterior.meaning.greedy import grouped
from posterior.meaning.nli import Nli
from posterior.models import base as base_models
from server.services import judge
from tests.server.mixture import Reference
from tests.server.running import KEY, PARTICLES, Running

WEIGHTS = (0.5, 0.3, 0.2)  # of the folder "gang"
N, SEED = 12, 11
TURN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
ENDED_BY_A_STOP_TOKEN = {"prompt": "yes, yes, yes, no, yes, yes, no, yes, yes,", "ends": ","}
ENDED_BY_THE_BASE = {"prompt": f"{TURN}Hello!<|im_end|>\n" * 3 + TURN, "ends": "<|im_end|>"}


@pytest.fixture(scope="module")
def reference(server: Running) -> Reference:
    return Reference(server.base, [server.gang.path / f"particles/{k:03d}" for k in range(PARTICLES)])


def body(server: Running, case: dict[str, Any]) -> dict[str, Any]:
    """A completion whose texts end soon, at a token that is the most probable one."""
    (end,) = base_models.load_tokenizer(server.base).encode(case["ends"])
    return {"model": "gang", "prompt": case["prompt"], "max_tokens": 5, "seed": SEED, "stop_token_ids": [end]}


def drawn(server: Running, sent: dict[str, Any]) -> list[dict[str, Any]]:
    """The same samples as ordinary choices, which show their tokens."""
    options = {"tokens": True, "per_particle": True}
    plain = {**sent, "n": N, "temperature": 1, "top_p": 1, "top_k": 0, "return_token_ids": True}
    return list(server.post("/v1/completions", **plain, uncertainty=options)["choices"])


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(ENDED_BY_A_STOP_TOKEN, id="stop token"),
        pytest.param(ENDED_BY_THE_BASE, id="end of sequence"),
    ],
)
def test_meanings_equal_those_of_transformers(server: Running, reference: Reference, case: dict[str, Any]) -> None:
    sent = body(server, case)
    tokenizer = base_models.load_tokenizer(server.base)
    prompt = tokenizer.encode(case["prompt"])
    choices = drawn(server, sent)
    log_p = []
    for choice in choices:
        ids = choice["token_ids"]
        whole = reference.log_p(prompt, ids)[range(len(ids)), :, ids].sum(0).tolist()
        assert choice["uncertainty"]["per_particle"]["logprob"] == pytest.approx(whole, abs=2e-3)
        assert len(choice["uncertainty"]["tokens"]) == len(ids)
        log_p.append(whole)
    ended = [c["token_ids"] for c in choices if c["finish_reason"] == "stop"]
    assert ended and all(ids[-1] in sent["stop_token_ids"] for ids in ended), "the token that ends a text counts"

    groups = exact([choice["text"] for choice in choices])
    assert 1 < len(set(groups)) < N, "samples that agree, and samples that do not"
    joint = [[0.0] * PARTICLES for _ in set(groups)]
    for group, row in zip(groups, log_p, strict=True):
        each = [w * math.exp(value) for w, value in zip(WEIGHTS, row, strict=True)]
        for k in range(PARTICLES):
            joint[group][k] += each[k] / sum(each) / N
    weights = [sum(row[k] for row in joint) for k in range(PARTICLES)]
    total = -sum(sum(row) * math.log(sum(row)) for row in joint)
    aleatoric = -sum(q * math.log(q / w) for row in joint for q, w in zip(row, weights, strict=True) if q > 0)

    (answer,) = server.post("/v1/completions", **sent, uncertainty={"samples": N})["choices"]
    found = answer["uncertainty"]["semantic"]
    assert [each["samples"] for each in found["meanings"]] == sorted(map(groups.count, set(groups)), reverse=True)
    assert found["truncated"] == N - len(ended)
    assert found["entropy"] == pytest.approx(
        {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}, abs=2e-3
    )
    assert found["effective_particles"] == pytest.approx(1 / sum(w * w for w in weights), abs=1e-2)
    mixed = [math.log(sum(w * math.exp(v) for w, v in zip(WEIGHTS, row, strict=True))) for row in log_p]
    first = [i for i, choice in enumerate(choices) if exact([choice["text"], answer["text"]]) == [0, 0]]
    assert answer["uncertainty"]["logprob"] == pytest.approx(max(mixed[i] for i in first), abs=2e-3)
    assert len(first) == found["meanings"][0]["samples"] and found["meanings"][0]["text"] == answer["text"]


def judged(server: Running) -> Comparison:
    """What the base says to each pair alone."""

    def compare(question: str, text: str, others: Sequence[str]) -> list[bool]:
        prompts = [judge.asked(question, text, other) for other in others]
        items = server.predict(model=server.base_name, prompts=prompts, answers=[" yes", " no"])["data"]
        return [item["answer"] == " yes" for item in items]

    return compare


@pytest.mark.long
@pytest.mark.parametrize("way", ["embedding", "nli", "judge"])
def test_a_model_tells_meanings_apart(server: Running, way: str) -> None:
    sent = body(server, ENDED_BY_A_STOP_TOKEN)
    choices = sorted(drawn(server, sent), key=lambda choice: -choice["uncertainty"]["logprob"])
    compare: Comparison
    if way == "judge":
        compare = judged(server)
    else:
        compare = Nli(server.meaning / "nli") if way == "nli" else Embedding(server.meaning / "embedding")
    groups = grouped(sent["prompt"], [choice["text"] for choice in choices], compare)
    for returned in ("meaning", "greedy"):
        options = {"samples": N, "meaning": way, "return": returned}
        (answer,) = server.post("/v1/completions", **sent, uncertainty=options)["choices"]
        record = answer["uncertainty"]["semantic"]
        assert record["meaning"] == way
        assert [each["samples"] for each in record["meanings"]] == sorted(map(groups.count, set(groups)), reverse=True)


@pytest.mark.long
def test_the_same_seed_gives_the_same_answer_however_it_is_sent(server: Running) -> None:
    for returned in ("meaning", "greedy"):
        sent = body(server, ENDED_BY_A_STOP_TOKEN) | {"uncertainty": {"samples": N, "return": returned}}
        first, again = (server.post("/v1/completions", **sent) for _ in range(2))
        lines = httpx.post(
            f"{server.url}/v1/completions",
            json={**sent, "stream": True, "stream_options": {"include_usage": True}},
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=120,
        ).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        *chunks, usage = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        (one,), (two,) = first["choices"], again["choices"]
        streamed = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert one["text"] == two["text"] == streamed
        records = [each["uncertainty"]["semantic"] for each in (one, two, chunks[-1]["choices"][0])]
        for record in records[1:]:
            texts, expected = ([(m["text"], m["samples"]) for m in each["meanings"]] for each in (record, records[0]))
            assert texts == expected and record["own"] == records[0]["own"]
            assert record["entropy"] == pytest.approx(records[0]["entropy"], abs=1e-3)
        assert {name: first["usage"][name] for name in usage["usage"]} == usage["usage"]
        written = sum(len(choice["token_ids"]) for choice in drawn(server, body(server, ENDED_BY_A_STOP_TOKEN)))
        assert first["usage"]["completion_tokens"] >= written + (returned == "greedy")


def test_chats_and_theta_star_have_meanings_too(server: Running) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    sent: dict[str, Any] = {"messages": messages, "max_tokens": 3, "uncertainty": {"samples": 3}}
    for model, predictive in (("gang", "mixture"), ("mood/map", "map")):
        (choice,) = server.post("/v1/chat/completions", model=model, **sent)["choices"]
        record = choice["uncertainty"]
        assert record["predictive"] == predictive and record["semantic"]["samples"] == 3
        assert choice["message"]["content"] == record["semantic"]["meanings"][0]["text"]


@pytest.mark.parametrize("returned", ["meaning", "greedy"])
def test_a_client_that_leaves_leaves_no_sample_behind(server: Running, returned: str) -> None:
    sent = {
        "model": "gang", "prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True,
        "uncertainty": {"samples": 3, "return": returned},
    }  # fmt: skip
    with (
        httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=3) as http,
        contextlib.suppress(httpx.ReadTimeout),  # a sample is sent when all are there
        http.stream("POST", f"{server.url}/v1/completions", json=sent) as stream,
    ):
        next(stream.iter_lines())
        assert server.running_requests() >= PARTICLES
    deadline = time.monotonic() + 30
    while server.running_requests() and time.monotonic() < deadline:
        time.sleep(0.3)
    assert server.running_requests() == 0
