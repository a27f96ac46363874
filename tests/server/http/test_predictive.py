"""POST /v1/predictive with a fake engine: the numbers' meaning, and every kind of bad input."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from posterior.data.scoring import Scoring, Tokens
from posterior.predictive.mixture import from_particles
from server.errors import Unavailable
from server.http.schemas import MAX_BODY_BYTES
from server.services.predictive import Service
from tests.server import fakes
from tests.server.conftest import error_of

INPUT = {"inputs": [{"text": "good"}]}


def post(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/predictive", json={"model": "mood", **body})


def test_mixture_is_the_weighted_average_of_its_particles(client: TestClient, engine: fakes.Engine) -> None:
    result = post(client, model="gang", per_particle=True, **INPUT).json()
    item = result["data"][0]
    adapters = fakes.registry().served["gang"].particles
    log_p = torch.stack([fakes.particle_logits(a.number, 2) for a in adapters]).log_softmax(-1)
    expected = from_particles(log_p, torch.tensor([0.5, 0.3, 0.2]))
    assert [a["probability"] for a in item["answers"]] == pytest.approx(expected.probability.tolist(), abs=1e-12)
    assert item["per_particle"] == [pytest.approx(row) for row in log_p.exp().tolist()]
    assert item["entropy"]["epistemic"] == pytest.approx(item["entropy"]["total"] - item["entropy"]["aleatoric"])
    assert item["effective_particles"] == pytest.approx(1 / (0.25 + 0.09 + 0.04))
    assert engine.scored == [(1, 3)], "all particles in one call"
    assert (result["object"], result["model"], result["particles"]) == ("predictive", "gang", 3)
    assert result["posterior"] == "gang@abcdef012345"


@pytest.mark.parametrize("scores", ["mean", "sum"])
def test_answers_of_several_tokens_are_scored_as_the_posterior_was_fitted(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch, scores: Tokens
) -> None:
    """The fake's tokens are bytes, and its particles' means are known; the sums are those times 2 and 9."""
    gang = service.registry.served["gang"]
    assert gang.posterior is not None
    monkeypatch.setattr(gang.posterior, "task", replace(gang.posterior.task, scoring=Scoring(scores, 0.4)))
    item = post(client, model="gang", prompts=["x"], answers=["ab", "abcdefghi"], per_particle=True).json()["data"][0]
    f = torch.stack([fakes.particle_logits(a.number, 2) for a in gang.particles])
    expected = f if scores == "mean" else f * torch.tensor([2, 9])
    assert item["per_particle"] == [pytest.approx(row) for row in (0.4 * expected).softmax(-1).tolist()]


def test_record_has_every_field_and_probabilities_sum_to_one(client: TestClient) -> None:
    item = post(client, predictive="mixture", **INPUT).json()["data"][0]
    best = max(item["answers"], key=lambda a: a["probability"])
    assert sum(a["probability"] for a in item["answers"]) == pytest.approx(1)
    assert (item["answer"], item["confidence"]) == (best["answer"], best["probability"])
    assert item["logprob"] == pytest.approx(math.log(item["confidence"]))
    assert (item["calibrated"], item["calibration"], item["index"]) == (False, None, 0)
    assert item["variance"]["epistemic"] == pytest.approx(best["std"] ** 2)
    assert item["variance"]["total"] == pytest.approx(item["confidence"] * (1 - item["confidence"]))
    assert "per_particle" not in item and len(item["covariance"]) == 2 and item["mc_error"] > 0


@pytest.mark.parametrize(
    ("model", "predictive"), [("mood", "linearized"), ("gang", "mixture"), ("mood/map", "map"), ("tiny-base", "map")]
)
def test_default_predictive_of_each_kind_of_model(client: TestClient, model: str, predictive: str) -> None:
    result = post(client, model=model, prompts=["x"], answers=["a", "b"]).json()
    assert result["predictive"] == result["data"][0]["predictive"] == predictive


def test_fewer_particles_on_request(client: TestClient, engine: fakes.Engine) -> None:
    result = post(client, predictive="mixture", particles=3, **INPUT).json()
    assert result["particles"] == 3 and engine.scored == [(1, 3)]


def test_inputs_prompts_and_messages(client: TestClient) -> None:
    rendered = post(client, predictive="map", inputs=[{"text": "good"}, {"text": "bad"}]).json()
    raw = post(client, predictive="map", prompts=["good\nSentiment:", "bad\nSentiment:"]).json()
    assert rendered["data"] == raw["data"] and rendered["usage"] == raw["usage"]
    assert rendered["usage"] == {"prompt_tokens": 29, "completion_tokens": 0, "total_tokens": 29}
    chat = post(client, messages=[[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]])
    assert chat.status_code == 200


def test_special_tokens_in_a_prompt_are_served(client: TestClient) -> None:
    assert post(client, prompts=[f"a{fakes.SPECIAL}b\x00\u202e"]).status_code == 200


BAD: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "nobody", **INPUT}, 404, "model", "is not served"),
    ({"model": "../mood", **INPUT}, 404, "model", "is not served"),
    ({"model": 7, **INPUT}, 400, "model", "string"),
    ({}, 400, None, "exactly one of"),
    ({**INPUT, "prompts": ["x"]}, 400, None, "exactly one of"),
    ({"inputs": []}, 400, "inputs", "at least 1"),
    ({"prompts": ["x"] * 257}, 400, "prompts", "at most 256"),
    ({**INPUT, "answers": []}, 400, "answers", "at least 2"),
    ({**INPUT, "answers": [f"a{i}" for i in range(256)]}, 400, "answers", "at most 255"),
    ({**INPUT, "answers": ["a", "a"]}, 400, "answers", "alike"),
    ({**INPUT, "answers": ["a", ""]}, 400, "answers", "no tokens"),
    ({**INPUT, "answers": ["a", 3]}, 400, "answers.1", "string"),
    ({**INPUT, "predictive": "magic"}, 400, "predictive", "mixture"),
    ({"model": "gang", **INPUT, "predictive": "linearized"}, 400, "predictive", "no 'linearized'"),
    ({"model": "mood/map", **INPUT, "predictive": "mixture"}, 400, "predictive", "no 'mixture'"),
    ({**INPUT, "predictive": "mixture", "particles": 0}, 400, "particles", "greater"),
    ({**INPUT, "predictive": "mixture", "particles": 9}, 400, "particles", "holds 8"),
    ({**INPUT, "particles": 4}, 400, "particles", "belongs to"),
    ({**INPUT, "per_particle": True}, 400, "per_particle", "no particles"),
    ({**INPUT, "coverage": 1.0}, 400, "coverage", "less than 1"),
    ({**INPUT, "coverage": "wide"}, 400, "coverage", "number"),
    ({**INPUT, "temprature": 1}, 400, "temprature", "unknown field"),
    ({"inputs": [{"txt": "good"}]}, 400, "inputs", "'text' is missing"),
    ({"inputs": [{"text": "good", "more": "x"}]}, 400, "inputs", "unknown field 'more'"),
    ({"model": "tiny-base", **INPUT, "answers": ["a", "b"]}, 400, "inputs", "no template"),
    ({"model": "tiny-base", "prompts": ["x"]}, 400, "answers", "give 'answers'"),
    ({"prompts": [""]}, 400, None, "prompt 0 is empty"),
    ({"prompts": ["ok", "x" * 64]}, 400, None, "prompt 1 has 64 tokens"),
    (
        {"prompts": ["x"] * 256, "predictive": "mixture", "answers": ["abcdefgh", "bcdefghi"]},
        400,
        None,
        "the limit is 8192",
    ),
    ({"messages": [[]]}, 400, "messages.0", "at least 1"),
    ({"messages": [[{"role": "user", "content": [{"type": "image_url"}]}]]}, 400, "messages", "must be text"),
    ({"messages": [[{"content": "x"}]]}, 400, "messages", "role"),
    ({"messages": [[{"role": "assistant", "content": "x"}]]}, 400, "messages", "chat template"),
]


@pytest.mark.parametrize(
    ("body", "status", "param", "words"), BAD, ids=[f"{i}-{case[3]}" for i, case in enumerate(BAD)]
)
def test_bad_input_is_one_clear_line(
    client: TestClient, engine: fakes.Engine, body: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    error = error_of(post(client, **body), status)
    assert words in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"
    assert error["code"] == ("model_not_found" if status == 404 else None)
    assert engine.scored == [], "nothing was computed"


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b'"x"', b'{"model": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_malformed_json(client: TestClient, body: bytes) -> None:
    assert "JSON" in error_of(client.post("/v1/predictive", content=body), 400)["message"]


def test_body_too_large(client: TestClient) -> None:
    error = error_of(client.post("/v1/predictive", content=b" " * (MAX_BODY_BYTES + 1)), 413)
    assert error["code"] == "body_too_large"


def test_faults_of_ours_tell_nothing_of_our_inside(client: TestClient, engine: fakes.Engine) -> None:
    engine.failure = RuntimeError("secret /path\nline two")
    error = error_of(post(client, predictive="mixture", **INPUT), 500)
    assert error["type"] == "server_error" and "secret" not in error["message"]


def test_a_lost_worker_is_503_with_retry_after(client: TestClient, linearizer: fakes.Linearizer) -> None:
    linearizer.failure = Unavailable("starting again")
    response = post(client, **INPUT)
    assert error_of(response, 503)["type"] == "server_error" and int(response.headers["retry-after"]) > 0
