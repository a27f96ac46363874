"""Decisions of the real server: the stock OpenAI client, the same numbers by other routes, and again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from openai.types.decision import Decision
from posterior_client import (
    AsyncPosteriorClient,
    DecisionResponse,
    PosteriorClient,
    PredicateAnswer,
    uncertainty_of,
)

from posterior.data import decisions
from posterior.data.task import Task
from posterior.models import base as base_models
from posterior.models import lora
from server.cli import main
from tests.server.running import KEY, PARTICLES, Running

INPUT = "I waited an hour for the soup, and it was cold. The cake was wonderful. " * 3
LATE: dict[str, Any] = {"type": "predicate", "name": "late", "instructions": "The guest had to wait."}
MOOD: dict[str, Any] = {
    "type": "choice",
    "name": "mood",
    "instructions": "How does the guest feel?",
    "choices": [{"value": "angry"}, {"value": "glad", "description": "would come again"}, {"value": "neither"}],
}
STARS: dict[str, Any] = {
    "type": "score",
    "name": "stars",
    "instructions": "How good was it?",
    "levels": [{"label": label} for label in ("bad", "fair", "good")],
}
QUESTIONS = [LATE, MOOD, STARS]
OTHERS = [{"text": f"{number} ways to wait"} for number in range(6)]


@pytest.fixture(scope="session")
def sdk(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def ask(sdk: openai.OpenAI, model: str, **uncertainty: Any) -> Decision:
    body = {"uncertainty": uncertainty}
    return sdk.decisions.create(model=model, input=INPUT, questions=QUESTIONS, extra_body=body)


def ours(decision: Decision) -> list[dict[str, Any]]:
    return [answer.model_extra["uncertainty"] for answer in decision.answers]


def test_the_stock_client_reads_the_reply(sdk: openai.OpenAI, server: Running) -> None:
    found = ask(sdk, "mood")
    late, mood, stars = found.answers
    assert (late.type, mood.type, stars.type) == ("predicate", "choice", "score")
    assert [answer.name for answer in found.answers] == ["late", "mood", "stars"]
    assert 0 < late.probability < 1 and mood.choice in ("angry", "glad", "neither") and 0 <= stars.score <= 2
    assert sum(each.probability for each in mood.probabilities) == pytest.approx(1)
    assert found.model == f"mood@{server.mood.hash[:12]}" and found.model_extra["object"] == "decision"
    assert {each["predictive"] for each in ours(found)} == {"linearized"}
    low, high = ours(found)[0]["answers"][0]["interval"]
    assert low <= late.probability <= high


@pytest.mark.long
def test_the_async_client_reads_the_same(sdk: openai.OpenAI, server: Running) -> None:
    async def decide() -> Decision:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
            return await client.decisions.create(model="mood", input=INPUT, questions=QUESTIONS)

    assert asyncio.run(decide()).answers == ask(sdk, "mood").answers


def test_the_typed_client_reads_all_of_the_reply(sdk: openai.OpenAI, server: Running) -> None:
    request: Any = {"model": "mood", "input": INPUT, "questions": [LATE]}
    url, options = f"{server.url}/v1", {"coverage": 0.5}

    async def decide() -> DecisionResponse:
        async with AsyncPosteriorClient(url, KEY) as client:
            return await client.decisions(**request, uncertainty=options)

    with PosteriorClient(url, KEY) as client:
        (late,) = client.decisions(**request, uncertainty=options).answers
    stock = sdk.decisions.create(**request, extra_body={"uncertainty": options})
    assert isinstance(late, PredicateAnswer) and late.probability == stock.answers[0].probability
    assert [late.uncertainty] == uncertainty_of(stock) and asyncio.run(decide()).answers == (late,)


def test_the_command_shows_the_reply(
    server: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POSTERIOR_API_KEY", KEY)
    command = ["ask", INPUT, "--model", "mood", "--base-url", f"{server.url}/v1", "--predictive", "map"]
    command += ["--predicate", LATE["instructions"]]
    assert main([*command, "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert f"  yes  {answer['probability']:.3f}  " in shown and f"mood@{server.mood.hash[:12]}, map predictive" in shown
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--max-risk", ".05"])
    assert "no calibration tells how often such answers are wrong" in capsys.readouterr().err


def test_errors_are_the_clients_own(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no meaning for a decision"):
        ask(sdk, "mood", answers=["a", "b"])
    with pytest.raises(openai.NotFoundError, match="not served"):
        ask(sdk, "nobody")


@pytest.mark.parametrize("predictive", ["mixture", pytest.param("linearized", marks=pytest.mark.long)])
def test_each_question_is_the_prompt_of_its_task(sdk: openai.OpenAI, server: Running, predictive: str) -> None:
    """The same prompt and answers as a completion have the same distribution."""
    tokenizer, task = base_models.load_tokenizer(server.base), Task("decision", decisions.TEMPLATE, chat=True)
    for question, found in zip(QUESTIONS, ours(ask(sdk, "mood", predictive=predictive)), strict=True):
        prompt, answers = task.ask(tokenizer, INPUT, decisions.QUESTION.validate_python(question))
        options = {"answers": list(answers), "predictive": predictive}
        reply = server.post("/v1/completions", model="mood", prompt=prompt, uncertainty=options)
        expected = reply["choices"][0]["uncertainty"]
        assert found["particles"] == expected["particles"] == (PARTICLES if predictive == "mixture" else 1024)
        for name in ("probability", "std"):
            got, wanted = ([each[name] for each in record["answers"]] for record in (found, expected))
            assert got == pytest.approx(wanted, abs=1e-5)


def test_auto_answers_by_the_first_particles(sdk: openai.OpenAI) -> None:
    whole = ours(ask(sdk, "mood", predictive="mixture", per_particle=True))
    auto = ours(ask(sdk, "mood", predictive="mixture", particles="auto", per_particle=True))
    for every, some in zip(whole, auto, strict=True):
        n = some["particles"]
        assert 2 <= n == PARTICLES - some["left_out"]["particles"]
        for p, expected in zip(some["per_particle"], every["per_particle"][:n], strict=True):
            assert p == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("predictive", "tolerance"),
    [pytest.param("linearized", 0.0, marks=pytest.mark.long), ("mixture", 1e-5), ("map", 1e-5)],
)
def test_the_same_request_gives_the_same_numbers_whatever_is_asked_meanwhile(
    sdk: openai.OpenAI, server: Running, predictive: str, tolerance: float
) -> None:
    """Linearised: bit for bit. Else within 1e-5: vLLM's float32 sums depend on what shares the batch, and on how much
    of a prompt the prefix cache holds."""

    def numbers() -> list[float]:
        found = ours(ask(sdk, "mood", predictive=predictive))
        return [value for each in found for one in each["answers"] for value in (one["probability"], *one["interval"])]

    first = numbers()
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(server.predict, model="gang", inputs=OTHERS) for _ in range(2)]
        between = numbers()
        assert all(other.result()["data"] for other in others)
    for again in (between, numbers()):
        assert again == pytest.approx(first, abs=tolerance, rel=0.0)


@pytest.mark.parametrize("predictive", ["mixture", "map"])
def test_what_the_prefix_cache_spared_is_told(sdk: openai.OpenAI, predictive: str) -> None:
    """Questions about one input share it; asked again, every block of their prompts is there, under each particle.
    vLLM's blocks have 32 tokens here, and it always reads a prompt's last token."""

    def usage(input: str, questions: list[dict[str, Any]]) -> tuple[int, int]:
        body = {"uncertainty": {"predictive": predictive}}
        found = sdk.decisions.create(model="mood", input=input, questions=questions, extra_body=body).usage
        return found.input_tokens, found.input_tokens_details.cached_tokens

    text = f"{predictive}: nobody has asked about this. " + INPUT
    alone, nothing = usage(text, [LATE])
    assert nothing <= 32, "no more than how every chat begins"
    assert usage(text, [LATE]) == (alone, (alone - 1) // 32 * 32)
    fresh = f"{predictive}: nor about this. " + INPUT
    total, shared = usage(fresh, [LATE, LATE])
    assert shared == (total // 2 - 1) // 32 * 32, "the second question has what the first one read"


def test_label_mass_equals_transformers(server: Running) -> None:
    tokenizer, task = base_models.load_tokenizer(server.base), Task("decision", decisions.TEMPLATE, chat=True)
    question = decisions.QUESTION.validate_python({"type": "predicate", "instructions": "Is it late?"})
    prompt, answers = task.ask(tokenizer, '{"soup":"cold"}', question)
    model = lora.load_peft(base_models.load_model(server.base, torch.float32, "cpu"), server.mood.map_dir)
    with torch.no_grad():
        p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    labels = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
    assert [len(label) for label in labels] == [1, 1]
    body = {"state": {"soup": "cold"}, "questions": {"late": {"type": "noul", "instructions": "Is it late?"}}}
    for options in ({"predictive": "map"}, None):
        reply = server.post("/v1/systemone", model="mood", uncertainty=options, **body)
        diagnostics, answer = reply["diagnostics"]["late"], reply["answers"]["late"]
        mass = sum(float(p[label[0]]) for label in labels)
        assert diagnostics["label_mass"] == pytest.approx(mass, abs=1e-3, rel=5e-3)
        assert diagnostics["argmax_is_label"] == ([int(p.argmax())] in labels)
        assert answer["confidence"] == pytest.approx(max(answer["probabilities"].values()) * diagnostics["label_mass"])
