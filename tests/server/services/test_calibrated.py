"""Which answers are calibrated, and what changes in them; with a fake engine."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from posterior_client._uncertainty import predictive_response

from posterior.calibration.conformal import Conformal
from posterior.calibration.metrics import Estimate
from posterior.calibration.records import Key, Record, template_hash
from posterior.calibration.scalers import Calibrator, Platt, Temperature, Vector
from posterior.data.task import Task
from server.services.predictive import Service
from tests.server import fakes

INPUT = {"inputs": [{"text": "good"}]}
ONE = {"nll": Estimate(0.5, 0.4, 0.6)}
KEY = Key(
    base=fakes.BASE.hash,
    posterior=fakes.Posterior("mood", "laplace").hash,
    template=template_hash(fakes.Posterior("mood", "laplace").task),
    predictive="mixture",
    particles=3,
    dtype="bfloat16",
)


def record(key: Key = KEY, calibrator: Calibrator | None = None) -> Record:
    scores = tuple(i / 100 for i in range(1, 101))  # lac: the threshold at coverage c is about c
    return Record(
        key=key, calibrator=calibrator or Temperature(temperature=2.0), conformal=Conformal(score="lac", scores=scores),
        n=100, data="sha256:22", before=ONE, after=ONE, coverage=0.9, sets=ONE,
    )  # fmt: skip


def give(service: Service, *records: Record, name: str = "mood") -> None:
    posterior: Any = service.registry.served[name].posterior
    posterior.calibration = {item.key: item for item in records}


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    request = {"model": "mood", "predictive": "mixture", "particles": 3, **INPUT} | body
    response = client.post("/v1/predictive", json={key: value for key, value in request.items() if value is not None})
    assert response.status_code == 200, response.text
    return dict(response.json()["data"][0])


def test_a_matching_record_is_applied_and_named(client: TestClient, service: Service) -> None:
    plain = ask(client)
    give(service, record())
    item = ask(client)
    assert item["calibrated"] is True
    assert item["calibration"] == {
        "method": "temperature", "n": 100, "conformal": "lac", "data": "sha256:22", "key": KEY.model_dump(),
    }  # fmt: skip
    p = torch.tensor([a["probability"] for a in plain["answers"]], dtype=torch.float64)
    expected = (p.log() / 2).softmax(0).tolist()
    assert [a["probability"] for a in item["answers"]] == pytest.approx(expected)
    assert [a["uncalibrated"] for a in item["answers"]] == p.tolist()
    assert item["confidence"] == pytest.approx(max(expected))
    assert item["logprob"] == pytest.approx(math.log(max(expected)))


def test_what_belongs_to_the_posterior_stays(client: TestClient, service: Service) -> None:
    plain = ask(client, per_particle=True)
    give(service, record())
    item = ask(client, per_particle=True)
    for name in ("covariance", "entropy", "variance", "effective_particles", "mc_error", "per_particle", "answer"):
        assert item[name] == plain[name]
    for name in ("variance", "std", "interval"):
        assert [a[name] for a in item["answers"]] == [a[name] for a in plain["answers"]]
    assert set(item) - set(plain) == {"prediction_set"}


@pytest.mark.parametrize(
    "other",
    [
        {"base": "sha256:99"},
        {"posterior": "99"},
        {"template": "sha256:99"},
        {"predictive": "map"},
        {"particles": 4},
        {"dtype": "float32"},
    ],
)
def test_any_other_key_is_not_calibrated(client: TestClient, service: Service, other: dict[str, Any]) -> None:
    plain = ask(client)
    give(service, record(KEY.model_copy(update=other)))
    item = ask(client)
    assert item == plain and item["calibrated"] is False and item["calibration"] is None


@pytest.mark.parametrize(
    "body",
    [
        {"particles": 4},
        {"particles": None},
        {"predictive": "linearized", "particles": None},
        {"predictive": "map", "particles": None},
        {"inputs": None, "prompts": ["good\nSentiment:"]},
        {"inputs": None, "messages": [[{"role": "user", "content": "good"}]]},
        {"answers": [" positive", " negative"]},
        {"answers": [" negative", " neutral", " positive"]},
        {"model": "gang"},
    ],
)
def test_any_other_request_is_not_calibrated(client: TestClient, service: Service, body: dict[str, Any]) -> None:
    give(service, record())
    item = ask(client, **body)
    assert item["calibrated"] is False and item["calibration"] is None
    assert "prediction_set" not in item and "uncalibrated" not in item["answers"][0]


def test_the_template_of_the_posterior_counts(client: TestClient, service: Service) -> None:
    """The same posterior hash with another template cannot be: but if it were, the record would not match."""
    give(service, record())
    posterior: Any = service.registry.served["mood"].posterior
    posterior.task = dataclasses.replace(posterior.task, template="{text}?")
    assert ask(client)["calibrated"] is False
    posterior.task = Task("choice", "{text}\nSentiment:", (" negative", " positive"))
    assert ask(client)["calibrated"] is True


def test_the_task_s_own_answers_may_be_said(client: TestClient, service: Service) -> None:
    give(service, record())
    assert ask(client, answers=[" negative", " positive"])["calibrated"] is True


def test_answers_that_questions_bring_are_calibrated_by_their_number(client: TestClient, service: Service) -> None:
    posterior: Any = service.registry.served["mood"].posterior
    posterior.task = dataclasses.replace(posterior.task, answers=None)
    own = KEY.model_copy(update={"template": template_hash(posterior.task), "answers": 3})
    give(service, record(own))
    three = ask(client, answers=[" yes", " no", " perhaps"])
    assert three["calibrated"] is True and three["calibration"]["key"] == own.model_dump()
    own_p = torch.tensor([a["uncalibrated"] for a in three["answers"]], dtype=torch.float64)
    assert [a["probability"] for a in three["answers"]] == pytest.approx((own_p.log() / 2).softmax(0).tolist())
    assert ask(client, answers=[" no", " perhaps", " yes"])["calibrated"] is True, "any three"
    assert ask(client, answers=[" yes", " no"])["calibrated"] is False
    raw = ask(client, answers=[" yes", " no", " perhaps"], inputs=None, prompts=["good\nSentiment:"])
    assert raw["calibrated"] is False


@pytest.mark.parametrize(
    ("predictive", "particles", "dtype"), [("linearized", 1024, "float32"), ("map", 1, "bfloat16")]
)
def test_other_predictives_have_records_of_their_own(
    client: TestClient, service: Service, predictive: Any, particles: int, dtype: str
) -> None:
    """In the dtype of what computes them: the worker's for linearized, the engine's for the others."""
    key = KEY.model_copy(update={"predictive": predictive, "particles": particles, "dtype": dtype})
    give(service, record(key.model_copy(update={"dtype": "float16"})))
    assert ask(client, predictive=predictive, particles=None)["calibrated"] is False
    give(service, record(key))
    item = ask(client, predictive=predictive, particles=None)
    assert item["calibrated"] is True and item["calibration"]["key"]["particles"] == item["particles"] == particles
    if predictive == "map":
        assert ask(client, model="mood/map", predictive=None, particles=None)["calibrated"] is True


def test_records_of_another_dtype_are_said(service: Service) -> None:
    """One line with the command, unless there is one of the dtype that is served, too."""
    posterior: Any = service.registry.served["mood"].posterior
    posterior.path = "posteriors/mood"
    linear = KEY.model_copy(update={"predictive": "linearized", "particles": 1024, "dtype": "float32"})
    give(service, record(KEY.model_copy(update={"dtype": "float32"})), record(linear))
    (line,) = service.unapplied()
    assert "mood's mixture was made in float32 and is not applied to answers in bfloat16" in line and "\n" not in line
    assert "`posterior calibrate posteriors/mood ROWS --predictive mixture --particles 3 --dtype bfloat16`" in line
    give(service, record(KEY.model_copy(update={"dtype": "float32"})), record(KEY), record(linear))
    assert service.unapplied() == []


def test_chat_is_not_calibrated(client: TestClient, service: Service) -> None:
    give(service, *(record(KEY.model_copy(update={"particles": k})) for k in (3, 8)))
    options = {"answers": [" negative", " positive"], "predictive": "mixture", "particles": 3}
    for path, prompt in (
        ("chat/completions", {"messages": [{"role": "user", "content": "good"}]}),
        ("completions", {"prompt": "good\nSentiment:"}),
    ):
        reply = client.post(f"/v1/{path}", json={"model": "mood", "uncertainty": options, **prompt}).json()
        assert reply["choices"][0]["uncertainty"]["calibrated"] is False


def test_sets_grow_with_the_coverage_asked_for(client: TestClient, service: Service) -> None:
    give(service, record())
    item = ask(client)
    own = {a["answer"]: a["uncalibrated"] for a in item["answers"]}
    best, other = sorted(own, key=lambda text: -own[text])
    assert ask(client, coverage=0.01)["prediction_set"] == [best], "never empty"
    edge = 1 - own[other]  # lac: this answer enters when the threshold reaches 1 - p
    assert set(ask(client, coverage=edge - 0.03)["prediction_set"]) == {best}
    assert ask(client, coverage=edge + 0.03)["prediction_set"] == list(own), "in the order asked"
    assert ask(client, coverage=0.9999)["prediction_set"] == list(own), "100 rows cannot promise it"


def test_the_answer_follows_the_calibrated_probabilities(client: TestClient, service: Service) -> None:
    plain = ask(client)
    names = [a["answer"] for a in plain["answers"]]
    bias = tuple(-9.0 if name == plain["answer"] else 9.0 for name in names)
    give(service, record(calibrator=Vector(scale=(1.0, 1.0), bias=bias)))
    item = ask(client, coverage=0.01)
    assert item["answer"] != plain["answer"] and item["confidence"] > 0.9
    assert item["answer"] in item["prediction_set"]
    assert item["variance"]["epistemic"] == item["answers"][names.index(item["answer"])]["variance"]


def test_the_python_client_reads_it(client: TestClient, service: Service) -> None:
    give(service, record(calibrator=Platt(slope=0.5, intercept=0.0)))
    body = client.post(
        "/v1/predictive", json={"model": "mood", "predictive": "mixture", "particles": 3, **INPUT}
    ).json()
    one = predictive_response(body).data[0]
    assert one.calibrated and one.calibration is not None and one.calibration["method"] == "platt"
    assert one.prediction_set == (" negative", " positive") or len(one.prediction_set or ()) == 1
    assert one.answers[0].uncalibrated is not None
    give(service)
    body = client.post(
        "/v1/predictive", json={"model": "mood", "predictive": "mixture", "particles": 3, **INPUT}
    ).json()
    one = predictive_response(body).data[0]
    assert (one.calibrated, one.prediction_set, one.answers[0].uncalibrated) == (False, None, None)


def test_what_held_out_rows_chose_is_the_default(client: TestClient, service: Service) -> None:
    """The default changes with the choice, and answers say who chose their predictive."""
    plain = ask(client, predictive=None, particles=None)
    assert (plain["predictive"], plain["chosen_by"]) == ("linearized", "default")
    posterior: Any = service.registry.served["mood"].posterior
    posterior.choice = SimpleNamespace(predictive="map")
    chosen = ask(client, predictive=None, particles=None)
    assert (chosen["predictive"], chosen["chosen_by"]) == ("map", "held-out rows")
    asked = ask(client, predictive="mixture")
    assert (asked["predictive"], asked["chosen_by"]) == ("mixture", "request")
    models = {each["id"]: each for each in client.get("/v1/models").json()["data"]}
    assert models["mood"]["predictives"][0] == "map"
