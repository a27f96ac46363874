"""POST /v1/systemone with a fake engine: vLLM's form, our numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from server.engine.config import set_environment
from server.services.predictive import unprompted
from tests.server import fakes
from tests.server.conftest import error_of

set_environment("cpu")  # before vLLM, as the server does

from vllm.entrypoints.generate.structured_decisions.protocol import StructuredDecisionResponse  # noqa: E402
from vllm.entrypoints.generate.structured_decisions.question_types import build_question  # noqa: E402

QUESTIONS: dict[str, dict[str, Any]] = {
    "mood": {"type": "choice", "instructions": "How is it?", "criteria": {"glad": "likes it", "cross": None}},
    "late": {"type": "noul", "instructions": "Was it late?", "criteria": {"true": "after Friday"}},
    "haste": {"type": "score", "criteria": ["low", "middle", "high"]},
}


@pytest.fixture
def engine() -> fakes.Engine:
    return fakes.Engine(max_model_len=4096)


def ask(client: TestClient, **body: Any) -> Any:
    request = {"model": "gang", "state": {"parcel": ["late", None]}, "questions": QUESTIONS, **body}
    return client.post("/v1/systemone", json=request)


def test_the_reply_is_vllms_with_ours_in_it(client: TestClient) -> None:
    body = ask(client, request_id="7").json()
    found = StructuredDecisionResponse.model_validate(body)
    assert (found.id, found.object, found.model) == ("decision-7", "structured_decision", "gang@abcdef012345")
    assert list(found.answers) == list(found.diagnostics) == list(QUESTIONS)
    assert found.usage.input_tokens > 0 and found.usage.output_tokens == 0
    mood, late, haste = found.answers.values()
    assert [each["answer"] for each in late["uncertainty"]["answers"]] == [True, False]
    assert [each["answer"] for each in haste["uncertainty"]["answers"]] == [0, 1, 2]


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_answer_is_what_vllm_makes_of_the_same_probabilities(client: TestClient, name: str) -> None:
    body = ask(client).json()
    ours = body["answers"][name]
    asked = QUESTIONS[name]
    question = build_question(name, asked["type"], asked.get("instructions", ""), asked["criteria"], 26)
    p = [each["probability"] for each in ours["uncertainty"]["answers"]]
    vllms = question.type.answer(question, p, body["diagnostics"][name]["label_mass"])
    assert ours.keys() - vllms.keys() == {"uncertainty"}
    for field, value in vllms.items():
        assert ours[field] == (pytest.approx(value) if isinstance(value, float | dict) and field != "legend" else value)
    assert ours["uncertainty"]["confidence"] == max(p) > ours["confidence"]


@pytest.mark.parametrize(("model", "predictive"), [("gang", "mixture"), ("mood/map", "map"), (None, "map")])
def test_label_mass_is_the_weighted_mean_of_the_particles(
    client: TestClient, engine: fakes.Engine, model: str | None, predictive: str
) -> None:
    """The fake's options have half of the probability for each of their tokens, here three and two bytes."""
    engine.top = ord("y")
    body = ask(client, model=model, questions={"late": QUESTIONS["late"]}).json()
    served = fakes.registry().served[model or "tiny-base"]
    adapters = served.particles or (served.map,)
    log_p = torch.stack([fakes.particle_logits(a.number if a else 0, 2) for a in adapters]) * torch.tensor([3, 2])
    weights = torch.tensor(served.weights or (1.0,), dtype=torch.float64)
    assert body["diagnostics"]["late"]["label_mass"] == pytest.approx(float((weights @ log_p.exp()).sum()))
    assert body["diagnostics"]["late"]["argmax_is_label"] is True
    assert body["answers"]["late"]["uncertainty"]["predictive"] == predictive
    engine.top = ord("z")
    assert ask(client).json()["diagnostics"]["late"]["argmax_is_label"] is False


def test_the_linearised_predictive_has_the_label_mass_of_theta_star(client: TestClient, engine: fakes.Engine) -> None:
    linearised, point = ask(client, model="mood").json(), ask(client, model="mood/map").json()
    assert linearised["answers"]["late"]["uncertainty"]["predictive"] == "linearized"
    assert linearised["diagnostics"] == point["diagnostics"] and engine.scored == [(1, 1)] * 6


def test_an_option_that_begins_another_is_counted_once() -> None:
    log_p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.4]], dtype=torch.float64).log()
    found = unprompted(((1,), (1, 2), (3,)), log_p, torch.tensor([3, 4]), torch.tensor([0.75, 0.25]))
    assert found.mass == pytest.approx(0.75 * 0.7 + 0.25 * 0.5) and found.likeliest
    assert not unprompted(((1,), (3,)), log_p[:, :2], torch.tensor([3, 4]), torch.tensor([0.25, 0.75])).likeliest


def test_json_and_instructions_are_part_of_the_prompt(client: TestClient) -> None:
    def tokens(**body: Any) -> int:
        return int(ask(client, questions={"late": {"type": "noul"}}, **body).json()["usage"]["input_tokens"])

    assert tokens(state="") + len('{"a":[1,"é"]}'.encode()) == tokens(state={"a": [1, "é"]})
    assert tokens(state="x") + len("Be kind.\n\n") == tokens(state="x", instructions="Be kind.")


BAD: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "nobody"}, 404, "model", "is not served"),
    ({"questions": {}}, 400, "questions", "at least 1"),
    ({"questions": {"": QUESTIONS["late"]}}, 400, None, "at least 1"),
    ({"questions": {"a": {"type": "choice", "criteria": {"one": None}}}}, 400, "questions.a.criteria", "at least 2"),
    ({"questions": {"a": {"type": "choice", "criteria": ["x", "y"]}}}, 400, "questions.a.criteria", "JSON object"),
    ({"questions": {"a": {"type": "choice", "criteria": {"x": None, "": None}}}}, 400, "questions.a", "question a: "),
    ({"questions": {"a": {"type": "score", "criteria": ["x", "x"]}}}, 400, "questions.a", "must differ"),
    ({"questions": {"a": {"type": "noul", "criteria": {"maybe": ""}}}}, 400, None, "unknown field"),
    ({"questions": {"a": {"type": "noul", "more": 1}}}, 400, "questions.a.more", "unknown field"),
    ({"questions": {"a": {"type": "essay"}}}, 400, "questions.a", "noul"),
    ({"images": ["http://169.254.169.254/"]}, 400, "images", "not served here"),
    ({"audio": ["data:"]}, 400, "audio", "not served here"),
    ({"videos": ["data:"]}, 400, "videos", "not served here"),
    ({"cache_salt": "x"}, 400, "cache_salt", "not served here"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, 400, "chat_template_kwargs", "not served here"),
    ({"uncertainty": {"tokens": True}}, 400, "uncertainty.tokens", "no meaning"),
]


@pytest.mark.parametrize(("body", "status", "param", "words"), BAD, ids=[f"{i}-{c[3]}" for i, c in enumerate(BAD)])
def test_bad_input_is_one_clear_line(
    client: TestClient, engine: fakes.Engine, body: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    error = error_of(ask(client, **body), status)
    assert words in error["message"] and (param is None or error["param"] == param), error
    assert engine.scored == [], "nothing was computed"


def test_a_state_is_needed(client: TestClient) -> None:
    error = error_of(client.post("/v1/systemone", json={"model": "gang", "questions": QUESTIONS}), 400)
    assert error["param"] == "state" and "required" in error["message"]
    assert ask(client, state=None).status_code == ask(client, images=[], priority=0).status_code == 200
