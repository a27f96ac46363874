"""POST /v1/predictive with `texts` and a fake engine: the mixture's formula, the reply's shape, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.engine.gang import MAX_SCORED
from server.errors import Refused
from server.services.predictive import Service
from tests.server import fakes
from tests.server.conftest import error_of

WEIGHTS = (0.5, 0.3, 0.2)  # of "gang"
P = (1 / 2, 1 / 3, 1 / 4)  # of each token under its particles
RECORD = {
    "index", "text", "posterior", "predictive", "calibrated", "calibration", "mixing", "particles", "confidence",
    "mean_token_probability", "logprob", "expected_logprob", "information", "entropy", "effective_particles",
    "mc_error",
}  # fmt: skip


def post(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/predictive", json={"model": "gang", "prompts": ["x"], "texts": ["ab"], **body})


def test_a_text_is_scored_by_bayes_rule(client: TestClient, engine: fakes.Engine) -> None:
    reply = post(client, prompts=["x", "yz"], texts=["ab", "c"]).json()
    assert engine.scored == [(2, 3)], "all prompts and particles in one call"
    assert [(item["index"], item["text"]) for item in reply["data"]] == [(0, "ab"), (1, "c")]
    assert reply["usage"] == {"prompt_tokens": 6, "completion_tokens": 0, "total_tokens": 6}
    assert (reply["model"], reply["predictive"], reply["particles"]) == ("gang", "mixture", 3)
    for item, length in zip(reply["data"], (2, 1), strict=True):
        assert item.keys() == RECORD
        joint = [w * p**length for w, p in zip(WEIGHTS, P, strict=True)]
        assert item["logprob"] == pytest.approx(math.log(sum(joint)))
        expected = sum(w * length * math.log(p) for w, p in zip(WEIGHTS, P, strict=True))
        assert item["expected_logprob"] == pytest.approx(expected)
        assert item["information"] == pytest.approx(item["logprob"] - expected)
        assert item["mean_token_probability"] == pytest.approx(math.exp(item["logprob"] / length))
        assert item["confidence"] is None
        assert item["effective_particles"] == pytest.approx(sum(joint) ** 2 / sum(j * j for j in joint))
        assert item["entropy"] == {"total": length, "aleatoric": 0.75 * length, "epistemic": 0.25 * length}
        assert (item["posterior"], item["calibrated"]) == (reply["posterior"], False)


def test_tokens_and_particles_are_told_on_request(client: TestClient) -> None:
    (item,) = post(client, mixing="token", tokens=True, per_particle=True).json()["data"]
    mean = sum(w * p for w, p in zip(WEIGHTS, P, strict=True))
    assert item["mixing"] == "token" and item["logprob"] == pytest.approx(2 * math.log(mean))
    assert item["per_particle"]["weight"] == pytest.approx(WEIGHTS), "token mixing leaves the weights"
    assert item["per_particle"]["logprob"] == pytest.approx([2 * math.log(p) for p in P])
    assert [token["logprob"] for token in item["tokens"]] == pytest.approx([math.log(mean)] * 2)
    assert item["tokens"][1]["per_particle"]["weight"] == pytest.approx(WEIGHTS)
    (item,) = post(client, tokens=True, per_particle=True).json()["data"]
    after = [w * p / mean for w, p in zip(WEIGHTS, P, strict=True)]
    assert item["tokens"][0]["per_particle"]["weight"] == pytest.approx(WEIGHTS), "the prompt is given, not drawn"
    assert item["tokens"][1]["per_particle"]["weight"] == pytest.approx(after)


@pytest.mark.parametrize(
    ("body", "predictive", "particles"),
    [
        ({}, "mixture", 3),
        ({"model": "mood"}, "mixture", 8),
        ({"particles": 2}, "mixture", 2),
        ({"particles": 1, "predictive": "mixture"}, "mixture", 1),
        ({"particles": 1}, "map", 1),
        ({"predictive": "map"}, "map", 1),
        ({"model": "gang/map"}, "map", 1),
        ({"model": "tiny-base"}, "map", 1),
    ],
)
def test_who_scores_a_text(client: TestClient, body: dict[str, Any], predictive: str, particles: int) -> None:
    reply = post(client, **body).json()
    (item,) = reply["data"]
    assert (reply["predictive"], reply["particles"]) == (item["predictive"], item["particles"])
    assert (item["predictive"], item["particles"]) == (predictive, particles)
    assert item["posterior"] == (None if body.get("model") == "tiny-base" else reply["posterior"])
    if particles == 1:
        assert (item["information"], item["mc_error"]) == (0.0, 0.0) and item["logprob"] == 2 * math.log(1 / 2)


def test_every_kind_of_prompt(client: TestClient) -> None:
    rendered = post(client, prompts=None, inputs=[{"text": "good"}]).json()
    assert rendered["usage"]["prompt_tokens"] == len("good\nSentiment:") + len("ab")
    chat = post(client, prompts=None, messages=[[{"role": "user", "content": "hi"}]], texts=[f"a{fakes.SPECIAL}"])
    assert chat.json()["usage"]["prompt_tokens"] == len("user: hi\nassistant:") + 2, "a spelled end is one token"


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"texts": []}, "texts", "at least 1"),
    ({"texts": [""]}, "texts.0", "at least 1"),
    ({"texts": ["a", 3]}, "texts.1", "string"),
    ({"texts": "a"}, "texts", "list"),
    ({"texts": ["a", "b"]}, None, "'texts' has 2 and 'prompts' 1; give a text for each prompt"),
    ({"prompts": None, "inputs": [{"text": "a"}] * 2}, None, "'texts' has 1 and 'inputs' 2"),
    ({"answers": ["a", "b"]}, None, "one of the two"),
    ({"prompts": None}, None, "exactly one of"),
    ({"prompts": ["x", ""], "texts": ["a", "b"]}, None, "prompt 1 is empty"),
    ({"prompts": ["x", "x" * 60], "texts": ["a", "abcd"]}, None, "prompt 1 has 60 tokens; with a text of 4 the limit"),
    ({"predictive": "linearized"}, "predictive", "text under the 'linearized' predictive"),
    ({"particles": "auto"}, "particles", "give a number of particles"),
    ({"particles": 4}, "particles", "this server holds 3"),
    ({"particles": 2, "predictive": "map"}, "predictive", "one adapter"),
    ({"mixing": "token", "predictive": "map"}, "predictive", "one adapter"),
    ({"model": "tiny-base", "predictive": "mixture"}, "predictive", "one adapter"),
    ({"model": "tiny-base", "prompts": None, "inputs": [{"text": "a"}]}, "inputs", "no template"),
    ({"prompts": None, "inputs": [{"txt": "a"}]}, "inputs", "'text' is missing"),
    ({"prompts": None, "messages": [[{"role": "assistant", "content": "x"}]]}, "messages", "chat template"),
    ({"mixing": "average"}, "mixing", "sequence"),
    ({"samples": 3}, "samples", "unknown field"),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD, ids=[f"{i}-{case[2]}" for i, case in enumerate(BAD)])
def test_bad_input_is_one_clear_line(
    client: TestClient, engine: fakes.Engine, body: dict[str, Any], param: str | None, words: str
) -> None:
    error = error_of(post(client, **body), 400)
    assert words in error["message"] and error["param"] == param
    assert engine.scored == [], "nothing was computed"


def test_the_longest_text_that_is_read(client: TestClient) -> None:
    """vLLM needs a place for the token that it writes after what it reads: 63 of 64."""
    assert post(client, prompts=["x" * 60], texts=["abc"]).status_code == 200


def test_limits_before_anything_is_computed(
    client: TestClient, engine: fakes.Engine, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.services.given.MAX_SEQUENCES", 5)
    error = error_of(post(client, prompts=["x"] * 2, texts=["a"] * 2), 400)
    assert "needs 6 sequences (prompts x particles); the limit is 5" in error["message"]
    engine.max_model_len = MAX_SCORED
    text = "a" * (MAX_SCORED // 3)
    error = error_of(post(client, texts=[text]), 400)
    assert f"prompt 0 and its text have {len(text) + 1} tokens; times 3 particles" in error["message"]
    assert engine.scored == [] and post(client, texts=[text], particles=2).status_code == 200


def test_the_engines_refusals_name_fields_of_this_route(client: TestClient, engine: fakes.Engine) -> None:
    for said, param in (("uncertainty.particles", "particles"), ("max_tokens", "texts"), (None, None)):
        engine.failure = Refused("it can never fit", said)
        error = error_of(post(client), 400)
        assert (error["message"], error["param"]) == ("it can never fit", param)


def test_metrics_count_texts(client: TestClient) -> None:
    post(client, prompts=["x", "y"], texts=["ab", "c"])
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'posterior_requests_total{endpoint="predictive",posterior="gang",predictive="mixture",status="200"} 1.0',
        'posterior_prompt_tokens_total{posterior="gang"} 5.0',
        'posterior_generated_tokens_total{posterior="gang"} 0.0',
        'posterior_token_epistemic_entropy_nats_count{posterior="gang"} 2.0',
        'posterior_effective_particles_ratio_count{posterior="gang"} 2.0',
    ):
        assert line in lines, line


def test_the_description_has_both_kinds_of_replies(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    kinds = [
        kind["items"]["$ref"].rpartition("/")[2] for kind in schemas["PredictiveReply"]["properties"]["data"]["anyOf"]
    ]
    assert kinds == ["PredictiveItem", "TextItem"] and set(schemas["TextItem"]["required"]) <= RECORD
