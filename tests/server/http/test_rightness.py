"""How probably texts are right, and which abstain; over a fake engine."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from posterior.calibration.metrics import Estimate
from posterior.calibration.rightness import PLAIN, SAMPLED, Model, TextKey, TextRecord
from posterior.calibration.risk import Risk
from server.services.predictive import Service
from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.http.sampling import DRAFTS, N, ask, chat
from tests.server.http.test_answers import MESSAGES, events

KEY = TextKey(
    base=fakes.BASE.hash, posterior=fakes.Posterior("gang", "particles").hash, predictive="mixture", particles=3,
    dtype="bfloat16", text="greedy",
)  # fmt: skip
SAMPLES = {"samples": N, "meaning": "exact"}
ONE = {"ece": Estimate(0.1, 0.05, 0.2)}


def record(strange: float = 9.0, **key: Any) -> TextRecord:
    """P(right) = sigmoid(1 + 2 mean_logprob + 3 own_meaning); 20 held-out answers of confidence .7, all right, and 20
    of .2, all wrong."""
    names = SAMPLED if key.get("samples") is not None else PLAIN
    weight = tuple({"mean_logprob": 2.0, "own_meaning": 3.0}.get(name, 0.0) for name in names)
    model = Model(
        features=names, center=(0.0,) * len(names), scale=(1.0,) * len(names), weight=weight, intercept=1.0,
    )  # fmt: skip
    risk = Risk(confidence=(0.7,) * 20 + (0.2,) * 20, right=(True,) * 20 + (False,) * 20)
    return TextRecord(
        key=KEY.model_copy(update=key), model=model, guard=model, strange=strange, risk=risk, n=80, data="sha256:2",
        grading="match", max_tokens=16, before=ONE, after=ONE,
    )  # fmt: skip


def give(service: Service, *records: TextRecord) -> None:
    posterior: Any = service.registry.served["gang"].posterior
    posterior.texts = {each.key: each for each in records}


@pytest.fixture(autouse=True)
def drafts(engine: fakes.Engine) -> Iterator[None]:
    engine.drafts = DRAFTS
    yield


def write(client: TestClient, **body: Any) -> Any:
    options = body.pop("uncertainty", {})
    whole = {"model": "gang", "prompt": "x", "temperature": 0, "uncertainty": options, **body}
    return client.post("/v1/completions", json=whole)


def told(response: Any) -> dict[str, Any]:
    """The uncertainty of the one choice."""
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return dict(choice["uncertainty"])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


HELLO = sigmoid(1 + 2 * math.log(0.5))  # of the fake's greedy text without samples


def test_without_a_record_nobody_says_that_a_text_is_right(client: TestClient) -> None:
    found = told(write(client))
    assert (found["confidence"], found["calibrated"], found["calibration"]) == (None, False, None)
    assert found["mean_token_probability"] == pytest.approx(0.5) and "abstain" not in found


def test_a_greedy_text_has_the_probability_of_its_record(client: TestClient, service: Service) -> None:
    give(service, record())
    for response in (
        write(client),
        write(client, max_tokens=3, stop=["."], top_p=0.5, logprobs=1, uncertainty={"tokens": True}),
        client.post("/v1/chat/completions", json={"model": "gang", "messages": MESSAGES, "temperature": 0}),
    ):
        found = told(response)
        assert found["confidence"] == pytest.approx(HELLO) and found["calibrated"] is True
        assert found["calibration"]["key"]["text"] == "greedy" and found["calibration"]["grading"] == "match"
        assert "abstain" not in found
    counted = service.metrics.text_confidence.labels("gang")
    assert counted._sum.get() == pytest.approx(3 * HELLO)


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 1},
        {"temperature": None},
        {"frequency_penalty": 0.5},
        {"logit_bias": {"5": 1}},
        {"response_format": {"type": "json_object"}},
        {"uncertainty": {"mixing": "token"}},
        {"uncertainty": {"particles": 2}},
        {"uncertainty": {"predictive": "map"}},
        {"model": "gang/map"},
    ],
)
def test_a_text_of_another_law_has_none(client: TestClient, service: Service, body: dict[str, Any]) -> None:
    give(service, record())
    found = told(write(client, **body))
    assert (found["confidence"], found["calibrated"]) == (None, False)


def test_theta_star_has_a_record_of_its_own(client: TestClient, service: Service) -> None:
    give(service, record(predictive="map", particles=1))
    for body in ({"uncertainty": {"predictive": "map"}}, {"model": "gang/map"}):
        found = told(write(client, **body))
        assert found["confidence"] == pytest.approx(HELLO) and found["predictive"] == "map"
    assert told(write(client))["confidence"] is None


def test_a_request_with_samples_uses_the_record_with_as_many(client: TestClient, service: Service) -> None:
    give(service, record(), record(**SAMPLES), record(text="meaning", **SAMPLES))
    for send in (ask, chat):
        found = told(send(client))
        mean = found["logprob"] / 1  # the text "paris" has one token
        assert found["confidence"] == pytest.approx(sigmoid(1 + 2 * mean + 3 * 3 / 5))
        assert found["calibration"]["key"]["text"] == "meaning" and found["calibration"]["key"]["samples"] == N
        found = told(send(client, uncertainty={"return": "greedy"}))
        assert found["confidence"] == pytest.approx(HELLO), "no sample means what the greedy text means"
        assert found["calibration"]["key"]["samples"] == N
        found = told(send(client, samples=4, uncertainty={"return": "greedy"}))
        assert found["calibration"]["key"]["samples"] is None, "no record is of 4 samples"
        assert told(send(client, samples=4))["confidence"] is None


def test_a_record_of_one_model_of_meanings_is_not_applied_to_those_of_another(
    client: TestClient, service: Service
) -> None:
    target: Any = service
    target.comparer = fakes.Comparer()
    for meaning, applied in (("embedding-0123", True), ("embedding-4567", False), ("embedding", False)):
        give(service, record(text="meaning", samples=N, meaning=meaning))
        assert told(ask(client, uncertainty={"meaning": "embedding"}))["calibrated"] is applied


def test_records_of_another_dtype_are_named_at_the_start(service: Service) -> None:
    give(service, record(dtype="float32"))
    target: Any = service.registry.served["gang"].posterior
    target.path = "/posteriors/gang"
    (line,) = service.unapplied()
    assert "gang's texts was made in float32" in line and line.endswith("--task text --dtype bfloat16`")


def test_a_record_of_given_answers_is_the_last_resort(client: TestClient, service: Service) -> None:
    given = record(text="given")
    give(service, given)
    assert told(write(client))["calibration"]["key"]["text"] == "given"
    assert told(ask(client))["calibration"]["key"]["text"] == "given"
    give(service, given, record())
    assert told(write(client))["calibration"]["key"]["text"] == "greedy"


def test_a_given_text_has_the_probability_of_such_a_record(client: TestClient, service: Service) -> None:
    give(service, record(), record(text="given"))
    sent = {"model": "gang", "prompts": ["x"], "texts": ["ab"]}
    (item,) = client.post("/v1/predictive", json=sent).json()["data"]
    assert item["confidence"] == pytest.approx(sigmoid(1 + item["logprob"]))  # 2 mean_logprob of two tokens
    assert item["calibration"]["key"]["text"] == "given"
    (item,) = client.post("/v1/predictive", json={**sent, "mixing": "token"}).json()["data"]
    assert item["confidence"] is None


def test_streams_say_it_at_their_end(client: TestClient, service: Service) -> None:
    give(service, record(), record(**SAMPLES))
    for options, samples in (({}, None), ({"samples": N, "return": "greedy"}, N)):
        body = {"model": "gang", "prompt": "x", "temperature": 0, "stream": True, "uncertainty": options}
        last = events(client.post("/v1/completions", json=body))[-1]["choices"][0]["uncertainty"]
        assert last["confidence"] == pytest.approx(HELLO) and last["calibration"]["key"]["samples"] == samples


# Act or hand over


@pytest.mark.parametrize(("strange", "reason"), [(9.0, "ambiguous"), (0.0, "unfamiliar")])
def test_a_text_that_is_too_unsure_abstains_and_is_there_all_the_same(
    client: TestClient, service: Service, strange: float, reason: str
) -> None:
    give(service, record(strange))
    response = write(client, uncertainty={"max_risk": 0.4})
    found = told(response)  # its confidence of .41 is below .7, from which on answers were right
    assert (found["abstain"], found["reason"]) == (True, reason)
    assert response.json()["choices"][0]["finish_reason"] == "stop" and response.json()["choices"][0]["text"] == "hello"


def test_a_text_that_is_sure_enough_does_not(client: TestClient, service: Service) -> None:
    give(service, record(text="meaning", **SAMPLES))
    found = told(ask(client, uncertainty={"max_risk": 0.4}))
    assert found["confidence"] > 0.7 and found["abstain"] is False and "reason" not in found


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"uncertainty": {"max_risk": 0.4, "particles": 2}}, "no calibration tells"),
        ({"uncertainty": {"max_risk": 0.01}}, "the 40 rows .* do not prove an error of at most 0.01"),
        ({"uncertainty": {"max_risk": 0.4}, "temperature": 1}, "give 'temperature' 0 or 'samples'"),
        ({"uncertainty": {"max_risk": 0.4}, "model": fakes.BASE.id}, "no calibration tells"),
        ({"uncertainty": {"max_risk": 0}}, "max_risk"),
        ({"uncertainty": {"max_risk": 1.0}}, "max_risk"),
        ({"uncertainty": {"max_risk": 0.1, "answers": ["a", "b"]}}, "'max_risk' and 'fields' belong to text"),
    ],
)
def test_an_error_that_no_record_bounds_is_refused(
    client: TestClient, service: Service, body: dict[str, Any], said: str
) -> None:
    give(service, record())
    error = error_of(write(client, **body), 400)
    assert re.search(said, error["message"]), error
    assert error["param"] is None or error["param"].startswith("uncertainty")
