"""How familiar a question is: where answers say so, by whose states, and what it makes of a refusal; a fake engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from posterior.calibration.familiarity import Center, Familiarity
from posterior.calibration.risk import Risk
from server.services.predictive import Service
from tests.server import fakes, folders
from tests.server.http.asking import answers
from tests.server.http.test_refusals import with_risk

MOOD = {"model": "mood", "inputs": [{"text": "good"}, {"text": "bad"}]}


@pytest.fixture
def engine() -> fakes.Engine:
    return fakes.Engine(max_model_len=4096)


def compare(service: Service, adapter: str, state: list[float], name: str = "mood", dtype: str = "bfloat16") -> None:
    """Held-out rows of a posterior at the distances 1, 2, ..., 99 from this state, under this adapter."""
    center = Center(torch.tensor([state]), torch.eye(4)[:1], torch.ones(1), torch.ones(1))
    posterior: Any = service.registry.served[name].posterior
    held = torch.arange(1.0, 100.0).double()
    posterior.familiarity = {(adapter, dtype): Familiarity(center, held, torch.zeros(99, dtype=torch.long))}


def ask(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/predictive", json=MOOD | body)
    assert response.status_code == 200, response.text
    return list(response.json()["data"])


def adapters(service: Service) -> tuple[float, float]:
    """The numbers of theta* and of the first particle."""
    served = service.registry.served["mood"]
    assert served.map is not None
    return float(served.map.number), float(served.particles[0].number)


@pytest.mark.parametrize(("options", "adapter"), folders.TOLD_BY)
def test_it_is_the_share_of_held_out_rows_at_least_as_far(
    client: TestClient, service: Service, options: dict[str, Any], adapter: str
) -> None:
    number = dict(zip(("map", "particle"), adapters(service), strict=True))[adapter]
    compare(service, adapter, [float(b"g"[0]), number, 1.0, -1.0])
    near, far = ask(client, **options)
    assert near["familiarity"] == 1.0  # the very state: all 99 are farther, and itself counts
    assert far["familiarity"] == pytest.approx((99 - (ord("g") - ord("b")) + 1 + 1) / 100)  # 5 away; 5 .. 99 are as far
    assert b'posterior_familiarity_count{posterior="mood"} 2.0' in service.metrics.text()


def test_answers_do_not_say_what_nothing_tells(client: TestClient, service: Service) -> None:
    assert "familiarity" not in ask(client)[0]
    compare(service, "map", [0.0, 0.0, 1.0, -1.0])
    assert "familiarity" not in ask(client, predictive="mixture")[0], "another adapter's states"
    assert "familiarity" not in ask(client, predictive="map", inputs=None, prompts=["good"])[0], "another prompt"
    compare(service, "map", [0.0, 0.0, 1.0, -1.0], dtype="float32")
    assert "familiarity" not in ask(client, predictive="map")[0], "another dtype"


def test_the_engine_reads_no_more_than_it_must(client: TestClient, service: Service, engine: fakes.Engine) -> None:
    ask(client, predictive="linearized")
    assert engine.scored == [], "nothing to compare with, so the linearised predictive does without the engine"
    compare(service, "map", [0.0, 0.0, 1.0, -1.0])
    ask(client, predictive="linearized")
    assert engine.scored == [(2, 1)]


@pytest.mark.parametrize(("distance", "reason"), [(96.0, "unfamiliar"), (94.0, "ambiguous")])
def test_a_refusal_is_of_an_unfamiliar_question_if_few_held_out_ones_are_as_strange(
    client: TestClient, service: Service, distance: float, reason: str
) -> None:
    found = with_risk(400, service, split=0.9999)
    assert found.risk is not None and isinstance(found.risk, Risk)
    (first, *_) = answers(client)
    prompt_state = service.registry.served["gang"].particles[0].number
    start = float(ord("T"))  # of INPUT
    compare(service, "particle", [start + distance, float(prompt_state), 1.0, -1.0], name="gang")
    held = answers(client, uncertainty={"max_risk": 0.05})
    assert {each["type"] for each in held} == {"refusal"}, "the case must hold refusals"
    assert {each["uncertainty"]["reason"] for each in held} == {reason}
    assert held[0]["uncertainty"]["familiarity"] == pytest.approx((99 - distance + 1 + 1) / 100)
    assert "familiarity" not in first["uncertainty"]
