"""POST /v1/decisions with a fake engine: OpenAI's form, our numbers, and every kind of bad question."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from openai.types.decision import Decision

from posterior.calibration.records import template_hash
from posterior.data.decisions import TEMPLATE
from posterior.data.examples import encode
from posterior.data.task import Task
from posterior.predictive.mixture import from_particles
from server.errors import PromptRefused, Unavailable
from server.services.predictive import Service
from tests.posterior.data.test_chat import THINKING
from tests.posterior.tokenizers_of_kinds import make
from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.http.asking import INPUT, LATE, MOOD, STARS, answers, choice, decide, own
from tests.server.services.test_calibrated import KEY, give, record


@pytest.fixture
def engine() -> fakes.Engine:
    return fakes.Engine(max_model_len=4096)


def test_the_reply_is_openais_with_ours_in_it(client: TestClient, engine: fakes.Engine) -> None:
    body = decide(client).json()
    decision = Decision.model_validate(body)
    assert [(each.type, each.name) for each in decision.answers] == [
        ("predicate", "late"),
        ("choice", None),
        ("score", None),
    ]
    assert engine.scored == [(1, 3)] * 3, "each question once, under all particles"
    assert (body["object"], body["model"]) == ("decision", "gang@abcdef012345")
    usage = body["usage"]
    assert usage["input_tokens"] == usage["total_tokens"] > 3 * len(INPUT) and usage["output_tokens"] == 0
    assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


def test_numbers_are_those_of_the_mixture(client: TestClient) -> None:
    late, mood, stars = answers(client)
    adapters = fakes.registry().served["gang"].particles
    for answer, options in ((late, 2), (mood, 3), (stars, 2)):
        log_p = torch.stack([fakes.particle_logits(a.number, options) for a in adapters]).log_softmax(-1)
        expected = from_particles(log_p, torch.tensor([0.5, 0.3, 0.2]))
        ours = answer["uncertainty"]
        assert [each["probability"] for each in ours["answers"]] == pytest.approx(expected.probability.tolist())
        assert [each["interval"] for each in ours["answers"]] == [
            pytest.approx(row) for row in expected.interval.tolist()
        ]
        assert ours["covariance"] == [pytest.approx(row) for row in expected.covariance.tolist()]
        assert ours["entropy"]["epistemic"] == pytest.approx(expected.epistemic)
    p = [each["probability"] for each in stars["uncertainty"]["answers"]]
    assert stars["score"] == pytest.approx(p[1]) and stars["confidence"] == max(p)
    assert stars["probabilities"] == [
        {"label": "low", "value": 0, "probability": p[0]}, {"label": "high", "value": 1, "probability": p[1]},
    ]  # fmt: skip
    assert late["probability"] == late["uncertainty"]["answers"][0]["probability"]


def test_values_keep_their_types(client: TestClient) -> None:
    late, mood, stars = answers(client)
    named = [[each["answer"] for each in answer["uncertainty"]["answers"]] for answer in (late, mood, stars)]
    assert named == [[True, False], ["glad", "true", True], [0, 1]]
    assert [each["value"] for each in mood["probabilities"]] == ["glad", "true", True]
    assert type(mood["probabilities"][2]["value"]) is bool
    best = max(mood["probabilities"], key=lambda each: each["probability"])
    assert (mood["choice"], type(mood["choice"])) == (best["value"], type(best["value"]))
    assert mood["confidence"] == mood["uncertainty"]["confidence"] == best["probability"]


@pytest.mark.parametrize(
    ("model", "predictive"), [("mood", "linearized"), ("gang", "mixture"), ("mood/map", "map"), ("tiny-base", "map")]
)
def test_every_model_decides(client: TestClient, model: str, predictive: str) -> None:
    assert {each["uncertainty"]["predictive"] for each in answers(client, model=model)} == {predictive}


def test_the_covariance_of_many_options_is_left_out(client: TestClient) -> None:
    small, large = answers(client, questions=[choice(16), choice(255)])
    assert len(small["uncertainty"]["covariance"]) == 16 and "covariance" not in large["uncertainty"]
    assert len(large["probabilities"]) == 255


def test_options_of_uncertainty(client: TestClient) -> None:
    (late,) = answers(client, questions=[LATE], uncertainty={"particles": 2, "per_particle": True, "coverage": 0.5})
    assert late["uncertainty"]["particles"] == len(late["uncertainty"]["per_particle"]) == 2
    (late,) = answers(client, model="mood", questions=[LATE], uncertainty={"predictive": "map"})
    assert late["uncertainty"]["predictive"] == "map"


def test_fields_of_openai_without_effect(client: TestClient) -> None:
    more = {"prompt_cache_key": "a", "prompt_cache_options": {"ttl": "30m"}, "safety_identifier": "b", "metadata": {}}
    assert answers(client, **more) == answers(client)


@pytest.mark.parametrize(
    ("options", "cached"),
    [({}, 3 * 7), ({"orders": 2}, 6 * 7), ({"particles": "auto"}, 3 * 7), ({"predictive": "linearized"}, 0)],
)
def test_what_the_prefix_cache_spared_is_told(
    client: TestClient, engine: fakes.Engine, options: dict[str, Any], cached: int
) -> None:
    """Seven tokens of each prompt; whatever an answer's particles are, the prompt counts once, as in input_tokens."""
    engine.cached = 7
    usage = decide(client, model="mood", uncertainty={"predictive": "mixture", **options}).json()["usage"]
    assert usage["input_tokens_details"] == {"cached_tokens": cached, "cache_write_tokens": 0}


def test_an_input_of_messages_and_calls(client: TestClient) -> None:
    plain = decide(client).json()["usage"]["input_tokens"]
    user = {"role": "user", "content": [{"type": "input_text", "text": INPUT}]}
    assert decide(client, input=[user]).json()["usage"]["input_tokens"] == plain
    items = [
        {"role": "user", "content": [{"type": "input_json", "data": {"a": [1, None]}}]},
        {"type": "function_call", "call_id": "1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "nothing"},
        {"role": "assistant", "content": "Hm."},
    ]
    assert answers(client, input=items)


# What is bounded


def test_many_backward_passes_are_answered_by_the_mixture_unless_asked_for(
    client: TestClient, engine: fakes.Engine
) -> None:
    few, many = [choice(33)] * 16, [choice(33)] * 16 + [LATE]  # 16 passes each, whatever has more options
    assert answers(client, model="mood", questions=few)[0]["uncertainty"]["predictive"] == "linearized"
    found = answers(client, model="mood", questions=many)
    assert {each["uncertainty"]["predictive"] for each in found} == {"mixture"}
    engine.scored.clear()
    error = error_of(decide(client, model="mood", questions=many, uncertainty={"predictive": "linearized"}), 400)
    assert "up to 257 backward passes for these 17 questions" in error["message"]
    assert "the limit is 256" in error["message"]
    assert error["param"] == "uncertainty.predictive" and engine.scored == []


def test_all_questions_together_are_bounded(client: TestClient, engine: fakes.Engine) -> None:
    error = error_of(decide(client, questions=[choice(255)] * 30, uncertainty={"orders": 8}), 400)
    assert "questions need" in error["message"] and "the limit is 8192" in error["message"]
    assert error["param"] == "questions" and engine.scored == []


def test_as_many_questions_as_openai_takes(client: TestClient, engine: fakes.Engine) -> None:
    assert len(answers(client, model="tiny-base", questions=[LATE] * 400)) == 400
    assert len(engine.scored) == 400


def test_one_question_of_many_evaluations_is_told_as_a_question(client: TestClient, engine: fakes.Engine) -> None:
    """255 options of 9 bytes, which the fake tokenizer reads one by one, under eight particles."""
    long = {**choice(255), "choices": [{"value": f"{i:03d}" * 3} for i in range(255)]}
    error = error_of(decide(client, model="mood", questions=[long], uncertainty={"predictive": "mixture"}), 400)
    assert error["message"].startswith("the questions need ") and "ask fewer questions" in error["message"]
    assert error["param"] == "questions" and engine.scored == []


BAD: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "nobody"}, 404, "model", "is not served"),
    ({"model": None}, 400, "model", "string"),
    ({"input": ""}, 400, "input", "at least 1"),
    ({"input": []}, 400, "input", "at least 1 item"),
    ({"input": 3}, 400, "input", "input: must be a text, or a list of messages"),
    ({"questions": []}, 400, "questions", "at least 1"),
    ({"questions": [LATE] * 401}, 400, "questions", "at most 400"),
    ({"questions": [{"type": "essay", "instructions": "x"}]}, 400, "questions.0", "predicate"),
    ({"questions": [{"type": "predicate"}]}, 400, "questions.0.instructions", "required"),
    ({"questions": [{**LATE, "choices": []}]}, 400, "questions.0.choices", "unknown field"),
    ({"questions": [choice(1)]}, 400, "questions.0.choices", "at least 2"),
    ({"questions": [choice(256)]}, 400, "questions.0.choices", "at most 255"),
    ({"questions": [{**MOOD, "choices": [{"value": "a"}, {"value": "a"}]}]}, 400, "questions.0.choices", "must differ"),
    ({"questions": [{**MOOD, "choices": [{"value": 1}, {"value": 2}]}]}, 400, None, "valid"),
    ({"questions": [LATE, {**MOOD, "choices": [{"value": "a"}, {"value": ""}]}]}, 400, "questions.1", "question 1: "),
    (
        {"questions": [{**STARS, "levels": [{"label": str(i)} for i in range(11)]}]},
        400,
        "questions.0.levels",
        "at most 10",
    ),
    ({"input": "x" * 5000}, 400, "questions.0", "question 0: its prompt has 5"),
    (
        {"input": [{"type": "function_call_output", "call_id": "7", "output": "x"}]},
        400,
        "input",
        "the output of call '7' stands before any such call",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://169.254.169.254/"}]}]},
        400,
        "input.0.content.0",
        "images are not read here",
    ),
    ({"uncertainty": {"answers": ["a", "b"]}}, 400, "uncertainty.answers", "no meaning"),
    ({"uncertainty": {"mixing": "token"}}, 400, "uncertainty.mixing", "no meaning"),
    ({"uncertainty": {"tokens": False}}, 400, "uncertainty.tokens", "no meaning"),
    ({"uncertainty": {"predictive": "linearized"}}, 400, "predictive", "no 'linearized'"),
    ({"uncertainty": {"particles": 9}}, 400, "particles", "holds 3"),
    ({"uncertainty": {"temprature": 1}}, 400, "uncertainty.temprature", "unknown field"),
]


@pytest.mark.parametrize(("body", "status", "param", "words"), BAD, ids=[f"{i}-{c[3]}" for i, c in enumerate(BAD)])
def test_bad_input_is_one_clear_line(
    client: TestClient, engine: fakes.Engine, body: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    error = error_of(decide(client, **body), status)
    assert words in error["message"] and (param is None or error["param"] == param), error
    assert engine.scored == [], "nothing was computed"


# One failure


NOUL = {"late": {"type": "noul", "instructions": "Is it late?"}}


@pytest.mark.parametrize(
    ("path", "name", "body"),
    [("decisions", "0", {"input": INPUT, "questions": [LATE]}), ("systemone", "late", {"state": 1, "questions": NOUL})],
)
def test_a_prompt_that_the_linearised_predictive_refuses_is_told_as_a_question(
    client: TestClient, linearizer: fakes.Linearizer, path: str, name: str, body: dict[str, Any]
) -> None:
    linearizer.failure = PromptRefused(0, "has 60 tokens: send at most 50")
    error = error_of(client.post(f"/v1/{path}", json={"model": "mood", **body}), 400)
    assert error["message"] == f"question {name}: its prompt has 60 tokens: send at most 50"
    assert error["param"] == f"questions.{name}"


def test_the_first_failure_is_raised_as_itself_and_aborts_the_others(
    client: TestClient, engine: fakes.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, engine.delay = engine.score, 60.0

    async def some(prompts: Any, candidates: Any, adapters: Any, **options: Any) -> Any:
        if len(candidates) == 3:
            raise Unavailable("the engine's queue is full")
        return await score(prompts, candidates, adapters, **options)

    monkeypatch.setattr(engine, "score", some)
    response = decide(client)
    assert error_of(response, 503)["message"] == "the engine's queue is full" and "retry-after" in response.headers
    assert engine.cancelled == 2


def test_faults_of_ours_tell_nothing_of_our_inside(client: TestClient, engine: fakes.Engine) -> None:
    engine.failure = RuntimeError("secret")
    assert "secret" not in error_of(decide(client), 500)["message"]


# The posterior's own task


def test_a_posterior_of_decisions_is_asked_as_it_was_fitted(client: TestClient, service: Service) -> None:
    default = decide(client, questions=[MOOD]).json()["usage"]["input_tokens"]
    own(service, labels="letters", chat=True)
    letters = decide(client, questions=[MOOD]).json()["usage"]["input_tokens"]
    assert letters == default + 3 * len("A: "), "each option has a letter before its words"


@pytest.mark.parametrize("fitted", [True, False])
def test_no_thoughts_stand_before_an_answer(
    client: TestClient, service: Service, engine: fakes.Engine, monkeypatch: pytest.MonkeyPatch, fitted: bool
) -> None:
    """Of a base whose template can leave them out: the prompt is that of the fit."""
    service.tokenizer = chat = make("byte-level")
    chat.chat_template = THINKING
    task = own(service, chat=True) if fitted else Task("decision", TEMPLATE, chat=True)
    score, prompts = engine.score, []

    async def recorded(asked: Any, *rest: Any, **options: Any) -> Any:
        prompts.extend(asked)
        return await score(asked, *rest, **options)

    monkeypatch.setattr(engine, "score", recorded)
    answers(client, questions=[LATE])
    (row,) = encode(task, chat, [{"input": INPUT, "question": LATE, "answer": True}])
    assert prompts == [list(row.prompt)] and chat.decode(prompts[0]).endswith("<assistant><think>\n\n</think>")


def test_its_calibration_is_applied_to_questions_of_its_kind(client: TestClient, service: Service) -> None:
    task = own(service, chat=True)
    key = KEY.model_copy(
        update={
            "posterior": fakes.Posterior("gang", "particles").hash,
            "template": template_hash(task),
            "question": "predicate",
        }
    )
    give(service, record(key), name="gang")
    late, mood, stars = answers(client)
    assert [each["uncertainty"]["calibrated"] for each in (late, mood, stars)] == [True, False, False]
    ours = late["uncertainty"]
    assert late["probability"] == ours["answers"][0]["probability"] != ours["answers"][0]["uncalibrated"]
    assert set(ours["prediction_set"]) <= {True, False} and ours["answer"] in ours["prediction_set"]
    assert ours["calibration"]["key"]["question"] == "predicate"
    shared = record(key.model_copy(update={"question": "any"}))
    give(service, record(key), shared, name="gang")
    used = [each["uncertainty"]["calibration"]["key"]["question"] for each in answers(client)]
    assert used == ["predicate", "any", "any"]


def test_another_task_of_the_same_posterior_is_not_calibrated(client: TestClient, service: Service) -> None:
    task = Task("decision", TEMPLATE, chat=True)
    key = KEY.model_copy(
        update={
            "posterior": fakes.Posterior("gang", "particles").hash,
            "template": template_hash(task),
            "question": "any",
        }
    )
    give(service, record(key), name="gang")
    assert not any(each["uncertainty"]["calibrated"] for each in answers(client))


def test_requests_are_counted(client: TestClient) -> None:
    decide(client)
    decide(client, questions=[])
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'posterior_requests_total{endpoint="decisions",posterior="gang",predictive="mixture",status="200"} 1.0',
        'posterior_requests_total{endpoint="decisions",posterior="none",predictive="none",status="400"} 1.0',
        'posterior_answers_total{posterior="gang",predictive="mixture"} 3.0',
    ):
        assert line in lines, line


def test_the_options_of_all_questions_are_bounded(client: TestClient, engine: fakes.Engine) -> None:
    error = error_of(decide(client, questions=[choice(255)] * 33), 400)
    assert error["message"] == "the questions have 8415 options; the limit is 8192: ask fewer at a time"
    assert engine.scored == []
