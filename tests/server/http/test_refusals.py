"""`uncertainty.max_risk` of decisions: which answers are refused, and when a record cannot tell."""

from __future__ import annotations

import pytest
import torch
from fastapi.testclient import TestClient
from openai.types.decision import Decision

from posterior.calibration.conformal import Conformal
from posterior.calibration.records import Record, template_hash
from posterior.calibration.risk import Risk
from server.services.predictive import Service
from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.http.asking import answers, decide, own
from tests.server.services.test_calibrated import KEY, give, record


@pytest.fixture
def engine() -> fakes.Engine:
    return fakes.Engine(max_model_len=4096)


def with_risk(rows: int, service: Service, split: float = 0.0) -> Record:
    """A record of rows that are right above the confidence `split`, and of as many below it that are wrong; given to
    the posterior."""
    key = KEY.model_copy(
        update={
            "posterior": fakes.Posterior("gang", "particles").hash,
            "template": template_hash(own(service)),
            "question": "any",
        }
    )
    right = torch.linspace(1, split, rows, dtype=torch.float64).tolist()
    wrong = torch.linspace(split, 0, rows + 1, dtype=torch.float64).tolist()[1:] if split else []
    risk = Risk(confidence=tuple(right + wrong), right=tuple(index < rows for index in range(len(right + wrong))))
    rows = len(right + wrong)
    scores = tuple(index / rows for index in range(rows))
    found = record(key).model_copy(update={"n": rows, "risk": risk, "conformal": Conformal(score="lac", scores=scores)})
    give(service, found, name="gang")
    return found


def test_answers_below_the_threshold_are_refused_with_their_reason(client: TestClient, service: Service) -> None:
    plain = answers(client)
    tops = sorted(max(each["probability"] for each in one["uncertainty"]["answers"]) for one in plain)
    found = with_risk(400, service, split=(tops[0] + tops[-1]) / 2)
    assert found.risk is not None
    threshold = found.risk.threshold(0.05)
    assert threshold is not None
    plain = answers(client)  # with the record's calibration
    held = answers(client, uncertainty={"max_risk": 0.05})
    Decision.model_validate(decide(client, uncertainty={"max_risk": 0.05}).json())
    kinds = set()
    for before, after in zip(plain, held, strict=True):
        options = before["uncertainty"]["answers"]
        sure = max(each["uncalibrated"] for each in options) >= threshold
        kinds.add(sure)
        assert after["type"] == (before["type"] if sure else "refusal")
        assert after["name"] == before["name"]
        if not sure:
            entropy = before["uncertainty"]["entropy"]
            reason = "ambiguous" if entropy["aleatoric"] >= entropy["epistemic"] else "unfamiliar"
            assert after["uncertainty"] == before["uncertainty"] | {"reason": reason}
            assert "probability" not in after and "choice" not in after
    assert kinds == {True, False}, "the case must hold both"
    reasons = [after["uncertainty"]["reason"] for after in held if after["type"] == "refusal"]
    for reason in ("ambiguous", "unfamiliar"):  # asked twice
        labels = {"posterior": "gang", "reason": reason}
        counted = service.metrics.registry.get_sample_value("posterior_abstentions_total", labels) or 0
        assert counted == 2 * reasons.count(reason)


def test_a_risk_needs_a_record_that_can_tell(client: TestClient, service: Service) -> None:
    body = {"uncertainty": {"max_risk": 0.05}}
    assert "make one of held-out rows with `posterior calibrate`" in error_of(decide(client, **body), 400)["message"]
    with_risk(60, service)
    assert "takes at least 86 rows" in error_of(decide(client, **body), 400)["message"]
    found = with_risk(400, service)
    give(service, found.model_copy(update={"risk": None}), name="gang")
    assert "does not tell how often answers are wrong" in error_of(decide(client, **body), 400)["message"]
    for wrong in (0, 1, -0.1, "x"):
        assert error_of(decide(client, uncertainty={"max_risk": wrong}), 400)["param"] == "uncertainty.max_risk"
