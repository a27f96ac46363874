"""`uncertainty.orders` of decisions: an average over orders of the options."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from posterior.data.decisions import QUESTION, fields, names, read
from posterior.predictive.mixture import entropy, from_particles
from server.services.decisions import _average
from server.services.options import Uncertainty
from server.services.questions import Answer
from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.http.asking import LATE, MOOD, answers, decide


@pytest.fixture
def engine() -> fakes.Engine:
    return fakes.Engine(max_model_len=4096)


def test_orders_of_the_options_are_part_of_the_mixture(client: TestClient, engine: fakes.Engine) -> None:
    """The fake engine's scores do not depend on the prompt, so that the average is what each order gives."""
    plain = answers(client)
    engine.scored.clear()
    averaged = answers(client, uncertainty={"orders": 4})
    assert engine.scored == [(1, 3)] * (2 + 4 + 2), "two options have two orders, and so have levels"
    for before, after, n in zip(plain, averaged, (2, 4, 2), strict=True):
        ours, own = after["uncertainty"], before["uncertainty"]
        assert ours["orders"] == {"n": n, "total_variation": pytest.approx(0, abs=1e-12)}
        assert ours["particles"] == own["particles"] == 3
        expected = [pytest.approx(each["probability"]) for each in own["answers"]]
        assert [each["probability"] for each in ours["answers"]] == expected
        assert ours["entropy"] == pytest.approx(own["entropy"]) and not ours["calibrated"]
    assert "orders" not in plain[0]["uncertainty"]


def test_an_average_over_orders_by_hand() -> None:
    p = torch.tensor([[[0.7, 0.3], [0.6, 0.4]], [[0.3, 0.7], [0.4, 0.6]]], dtype=torch.float64)  # [orders, K, C]
    weights = torch.tensor([0.25, 0.75])
    question: Any = SimpleNamespace(predictive="mixture", weights=weights, options=Uncertainty())
    found = _average([Answer(from_particles(each.log(), weights), each) for each in p], question)
    torch.testing.assert_close(found.predictive.probability, torch.tensor([0.5, 0.5], dtype=torch.float64))
    aleatoric = sum(float(w * entropy(row)) / 2 for each in p for w, row in zip(weights, each, strict=True))
    assert found.predictive.aleatoric == pytest.approx(aleatoric, abs=1e-7)
    assert found.orders is not None and found.orders.total_variation == pytest.approx(0.125, abs=1e-7)


def test_orders_are_of_particles(client: TestClient) -> None:
    body = {"model": "mood", "uncertainty": {"orders": 2, "predictive": "linearized"}}
    assert error_of(decide(client, **body), 400)["param"] == "uncertainty.orders"
    (one,) = answers(client, model="mood", questions=[LATE], uncertainty={"orders": 2})
    assert one["uncertainty"]["predictive"] == "mixture"


def test_letters_follow_the_order() -> None:
    question = read(QUESTION, MOOD, "question")
    row = fields("x", question, "letters", [2, 0, 1])
    assert row["options"].splitlines() == ["- A: true (boolean)", "- B: glad: likes it", "- C: true"]
    assert names(question, "letters", [2, 0, 1]) == ["B", "C", "A"]
