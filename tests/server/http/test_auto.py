"""`particles: "auto"`: prompts stop by themselves, what is said of it, and where it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from posterior.calibration.records import Key, template_hash
from posterior.predictive import sequential
from posterior.predictive.mixture import from_particles
from server.engine import Adapter, Scores
from server.errors import EngineLost
from server.services import predictive
from server.services.predictive import Service
from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.http.asking import LATE, answers, decide
from tests.server.services.test_calibrated import give, record

AUTO = {"predictive": "mixture", "particles": "auto"}
ANSWERS = [" no", " yes"]
SURE, OPEN = "sure", "open"  # prompts


class Agreeing(fakes.Engine):
    """Particles agree about prompts that begin as SURE does, and are far apart about those that begin as OPEN does."""

    async def score(self, prompts: Any, candidates: Any, adapters: Any, *, states: bool = False) -> Scores:
        log_p, top, *rest = await super().score(prompts, candidates, adapters, states=states)
        lengths = torch.tensor([len(tokens) for tokens in candidates])
        slopes = [
            [3.0 if list(prompt[:4]) == list(SURE.encode()) else a.number % 3 for a in adapters] for prompt in prompts
        ]
        apart = (torch.tensor(slopes)[..., None] * torch.arange(len(candidates))).double().log_softmax(-1) * lengths
        known = torch.tensor([list(prompt[:4]) in (list(SURE.encode()), list(OPEN.encode())) for prompt in prompts])
        return Scores(torch.where(known[:, None, None], apart, log_p), top, *rest)


@pytest.fixture
def engine() -> fakes.Engine:
    return Agreeing(max_model_len=4096)


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/predictive", json={"model": "mood", "answers": ANSWERS, **AUTO, **body})


def test_each_prompt_stops_by_itself(client: TestClient, engine: fakes.Engine) -> None:
    result = ask(client, prompts=[SURE, OPEN], per_particle=True).json()
    sure, open_ = result["data"]
    assert sure["particles"] == len(sure["per_particle"]) == 2 and open_["particles"] > 2
    assert sure["left_out"] == {"particles": 6, "total_variation": pytest.approx(0), "other_answer": pytest.approx(0)}
    assert result["particles"] == open_["particles"], "the most of any"
    assert (1, 2) in engine.scored and all(prompts == 1 for prompts, _ in engine.scored)
    assert sum(adapters for _, adapters in engine.scored) == sure["particles"] + open_["particles"], "none twice"


@pytest.mark.parametrize("model", ["mood", "gang"])
def test_the_answer_is_that_of_the_heaviest_particles_used(client: TestClient, service: Service, model: str) -> None:
    (item,) = ask(client, model=model, prompts=[OPEN], per_particle=True).json()["data"]
    served = service.registry.served[model]
    weights = torch.tensor(served.weights)
    log_p = torch.tensor([[0.0, a.number % 3] for a in served.particles]).double().log_softmax(-1)
    for n in sequential.stages(len(weights)):
        left_out = sequential.left_out(log_p[:n].exp(), weights)
        if left_out.negligible:
            break
    expected = from_particles(log_p[:n], weights[:n])
    assert item["particles"] == n and item["left_out"]["particles"] == len(weights) - n
    assert [each["probability"] for each in item["answers"]] == pytest.approx(expected.probability.tolist())
    assert item["entropy"]["epistemic"] == pytest.approx(expected.epistemic)
    assert item["mc_error"] == pytest.approx(float(expected.mc_error.max()))
    assert item["effective_particles"] == pytest.approx(expected.effective_particles)


def test_chats_and_decisions_take_it(client: TestClient) -> None:
    chat = {"model": "gang", "messages": [{"role": "user", "content": "x"}]}
    reply = client.post("/v1/chat/completions", json={**chat, "uncertainty": {**AUTO, "answers": ANSWERS}}).json()
    assert reply["choices"][0]["uncertainty"]["left_out"]["particles"] in (0, 1)
    (late,) = answers(client, questions=[LATE], uncertainty=AUTO)
    assert late["uncertainty"]["particles"] + late["uncertainty"]["left_out"]["particles"] == 3
    noul = {"late": {"type": "noul", "instructions": "Is it late?"}}
    body = {"model": "gang", "state": "x", "questions": noul, "uncertainty": AUTO}
    reply = client.post("/v1/systemone", json=body).json()
    assert "left_out" in reply["answers"]["late"]["uncertainty"] and 0 < reply["diagnostics"]["late"]["label_mass"] <= 1


def test_a_number_of_particles_leaves_nothing_to_say(client: TestClient) -> None:
    assert "left_out" not in ask(client, prompts=[SURE], particles=2).json()["data"][0]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"predictive": None}, "belongs to the predictive 'mixture'"),
        ({"predictive": "map"}, "belongs to the predictive 'mixture'"),
        ({"predictive": "linearized"}, "belongs to the predictive 'mixture'"),
        ({"particles": "all"}, "integer or 'auto'"),
    ],
)
def test_what_a_number_is_refused_for_is_refused(client: TestClient, body: dict[str, Any], says: str) -> None:
    error = error_of(ask(client, prompts=[SURE], **body), 400)
    assert error["param"] == "particles" and says in error["message"]


def test_text_takes_a_number(client: TestClient) -> None:
    for model in ("mood", "mood/map", "tiny-base"):
        body = {"model": model, "prompt": "x", "uncertainty": {"particles": "auto"}}
        error = error_of(client.post("/v1/completions", json=body), 400)
        assert error["param"] == "uncertainty.particles" and "give a number of particles" in error["message"]


def test_orders_and_risks_take_a_number(client: TestClient) -> None:
    error = error_of(decide(client, questions=[LATE], uncertainty={**AUTO, "orders": 2}), 400)
    assert error["param"] == "uncertainty.particles" and "'orders'" in error["message"]
    error = error_of(decide(client, questions=[LATE], uncertainty={**AUTO, "max_risk": 0.1}), 400)
    assert error["param"] == "uncertainty.max_risk" and "instead of 'auto'" in error["message"]


def test_limits_count_all_particles(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictive, "MAX_SEQUENCES", 15)
    body = {"prompts": ["a", "b"], "answers": ["a", "b"]}
    assert "16 evaluations" in error_of(ask(client, **body), 400)["message"]


@pytest.mark.parametrize("used", [2, 8])
def test_no_calibration_is_of_prompts_that_stop(client: TestClient, service: Service, used: int) -> None:
    task = fakes.Posterior("mood", "laplace").task
    key = Key(
        base=fakes.BASE.hash, posterior=fakes.Posterior("mood", "laplace").hash, template=template_hash(task),
        predictive="mixture", particles=used, dtype="bfloat16",
    )  # fmt: skip
    give(service, record(key))
    body = {"inputs": [{"text": SURE if used == 2 else OPEN}], "answers": None}
    (item,) = ask(client, **body).json()["data"]
    assert item["particles"] == used and not item["calibrated"]


def test_used_particles_are_counted(client: TestClient) -> None:
    ask(client, prompts=[SURE, SURE])
    ask(client, prompts=[SURE], particles=2)
    lines = client.get("/metrics").text.splitlines()
    assert 'posterior_auto_particles_count{posterior="mood"} 2.0' in lines
    assert 'posterior_auto_particles_sum{posterior="mood"} 4.0' in lines


def test_a_failure_of_a_later_stage_is_the_requests(
    client: TestClient, engine: fakes.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = engine.score

    async def fails(prompts: Any, candidates: Any, adapters: list[Adapter], **options: Any) -> Scores:
        if len(adapters) == 1:
            raise EngineLost
        return await score(prompts, candidates, adapters, **options)

    monkeypatch.setattr(engine, "score", fails)
    error_of(ask(client, prompts=[SURE, OPEN]), 503)
