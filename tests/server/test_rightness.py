"""How probably a real server's texts are right, by the record of their folder."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest

from posterior.calibration.rightness import PLAIN
from tests.server.running import KEY, PARTICLES, Running

PROMPT = "The capital of France is"


def confidence(server: Running, record: dict[str, Any], tokens: int) -> float:
    """By the record's formula, from what the answer says of the text."""
    (stored,) = server.gang.texts.values()
    values = {
        "mean_logprob": record["logprob"] / tokens,
        "logprob": record["logprob"],
        "information": record["information"],
        "entropy": record["entropy"]["total"] / tokens,
        "epistemic": record["entropy"]["epistemic"] / tokens,
        "length": math.log(tokens),
    }
    m = stored.model
    each = zip(PLAIN, m.center, m.scale, m.weight, strict=True)
    logit = m.intercept + sum(w * (values[name] - center) / scale for name, center, scale, w in each)
    return 1 / (1 + math.exp(-logit))


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_has_the_probability_of_the_record(server: Running, stream: bool) -> None:
    sent = {"model": "gang", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "uncertainty": {"max_risk": 0.3}}
    if stream:
        lines = httpx.post(
            f"{server.url}/v1/completions",
            json={**sent, "stream": True, "stream_options": {"include_usage": True}},
            headers={"Authorization": f"Bearer {KEY}"},
            timeout=120,
        ).text.split("\n\n")
        *_, last, usage = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        record, tokens = last["choices"][0]["uncertainty"], usage["usage"]["completion_tokens"]
    else:
        answer = server.post("/v1/completions", **sent)
        record, tokens = answer["choices"][0]["uncertainty"], answer["usage"]["completion_tokens"]
    assert record["confidence"] == pytest.approx(confidence(server, record, tokens), abs=1e-9)
    assert record["calibrated"] is True and record["particles"] == PARTICLES
    assert record["abstain"] is (record["confidence"] < 0.9)


def test_a_text_that_is_drawn_otherwise_has_none(server: Running) -> None:
    for other in ({"temperature": 1}, {"temperature": 0, "uncertainty": {"particles": 2}}):
        sent = {"model": "gang", "prompt": PROMPT, "max_tokens": 2, **other}
        (choice,) = server.post("/v1/completions", **sent)["choices"]
        assert (choice["uncertainty"]["confidence"], choice["uncertainty"]["calibrated"]) == (None, False)
