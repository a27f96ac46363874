"""Typed decisions of the Python client. Sync and async are twins: every call runs through both."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion
from posterior_client import (
    AsyncPosteriorClient,
    ChoiceAnswer,
    DecisionResponse,
    InputError,
    PosteriorClient,
    PredicateAnswer,
    Refusal,
    ResponseError,
    ScoreAnswer,
    uncertainty_of,
)
from posterior_client._uncertainty import decision_response

QUESTIONS: list[Any] = [
    {"type": "predicate", "name": "late", "instructions": "The guest had to wait."},
    {"type": "choice", "instructions": "Again?", "choices": [{"value": "true"}, {"value": "no"}, {"value": True}]},
    {"type": "score", "instructions": "How good?", "levels": [{"label": "bad"}, {"label": "good"}]},
]
CHAT: list[Any] = [{"role": "user", "content": "We waited."}]


def sync_decisions(url: str, **request: Any) -> DecisionResponse:
    with PosteriorClient(url) as client:
        return client.decisions(**request)


def async_decisions(url: str, **request: Any) -> DecisionResponse:
    async def ask() -> DecisionResponse:
        async with AsyncPosteriorClient(url) as client:
            return await client.decisions(**request)

    return asyncio.run(ask())


Call = Callable[..., DecisionResponse]


@pytest.fixture(params=[sync_decisions, async_decisions], ids=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    return request.param


def test_answers_have_their_types(call: Call, stub: Any) -> None:
    response = call(stub.url, model="sentiment", input="We waited.", questions=QUESTIONS)
    late, again, good = response.answers
    assert isinstance(late, PredicateAnswer) and (late.name, late.probability) == ("late", 0.5)
    assert isinstance(again, ChoiceAnswer) and (again.name, again.choice, again.confidence) == (None, True, 0.5)
    assert isinstance(good, ScoreAnswer) and good.probabilities[1].label == "good"
    assert (response.model, response.usage.input_tokens) == ("sentiment@0123456789ab", 7)


def test_options_keep_their_types(call: Call, stub: Any) -> None:
    """A text, a boolean and a number that JSON tells apart."""
    response = call(stub.url, model="sentiment", input="We waited.", questions=QUESTIONS)
    found = [[one.answer for one in answer.uncertainty.answers] for answer in response.answers]
    assert [[(type(each), each) for each in one] for one in found] == [
        [(bool, True), (bool, False)],
        [(str, "true"), (str, "no"), (bool, True)],
        [(int, 0), (int, 1)],
    ]


def test_each_answer_has_its_uncertainty(call: Call, stub: Any) -> None:
    late = call(stub.url, model="sentiment", input="We waited.", questions=QUESTIONS).answers[0].uncertainty
    assert (late.posterior, late.predictive, late.particles) == ("sentiment@0123456789ab", "linearized", 8)
    assert (late.calibrated, late.calibration, late.prediction_set, late.orders) == (False, None, None, None)
    assert late.entropy.epistemic_share == pytest.approx(0.1108, abs=1e-4)
    assert (late.answers[0].interval, late.variance.total, late.reason) == ((0.125, 0.5), 0.1875, None)


def test_a_refusal_says_why(call: Call, stub: Any) -> None:
    options = {"max_risk": 0.05, "coverage": 0.5}
    response = call(stub.url, model="sentiment", input=CHAT, questions=QUESTIONS, uncertainty=options)
    assert [isinstance(answer, Refusal) for answer in response.answers] == [False, True, True]
    assert [answer.uncertainty.reason for answer in response.answers] == [None, "unfamiliar", "ambiguous"]
    assert [answer.uncertainty.familiarity for answer in response.answers] == [None, 0.01, None]
    assert response.answers[1].uncertainty.answer is True  # what it would have been
    assert stub.bodies == [{"model": "sentiment", "input": CHAT, "questions": QUESTIONS, "uncertainty": options}]


def test_only_what_was_said_is_sent(call: Call, stub: Any) -> None:
    call(stub.url, model="sentiment", input="a", questions=QUESTIONS[:1])
    assert stub.bodies == [{"model": "sentiment", "input": "a", "questions": QUESTIONS[:1]}]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"input": "\udce9"}, "input holds"),
        ({"questions": [{"type": "predicate", "instructions": "\udce9"}]}, "questions holds"),
        ({"uncertainty": {"max_risk": float("nan")}}, "uncertainty is nan; give a finite number"),
    ],
)
def test_what_cannot_be_sent_is_not_sent(call: Call, stub: Any, given: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        call(stub.url, **{"model": "sentiment", "input": "a", "questions": QUESTIONS, **given})
    assert stub.bodies == []


def test_another_number_of_answers_is_another_server_s(call: Call, stub: Any) -> None:
    with pytest.raises(ResponseError, match="3 questions were asked, and 0 answers came"):
        call(stub.url, model="broken", input="a", questions=QUESTIONS)


@pytest.mark.parametrize("body", [None, {}, {"answers": 3}, {"answers": [{"type": "other"}]}])
def test_what_is_no_decision(body: Any) -> None:
    with pytest.raises(ResponseError, match="no decision|unreadable"):
        decision_response(body, 1)


def test_the_twins_take_the_same_arguments() -> None:
    twins = [inspect.signature(kind.decisions) for kind in (PosteriorClient, AsyncPosteriorClient)]
    assert twins[0] == twins[1]


def test_uncertainty_of_the_stock_client_s_decision(stub: Any) -> None:
    with OpenAI(base_url=stub.url, api_key="none") as client, PosteriorClient(stub.url) as own:
        decision = client.decisions.create(
            model="sentiment", input="a", questions=QUESTIONS, extra_body={"uncertainty": {"max_risk": 0.05}}
        )
        response = own.decisions(model="sentiment", input="a", questions=QUESTIONS, uncertainty={"max_risk": 0.05})
    found = uncertainty_of(decision)
    assert found == [answer.uncertainty for answer in response.answers]
    assert found == [uncertainty_of(answer) for answer in decision.answers]


def test_a_decision_without_uncertainty() -> None:
    """OpenAI's own, or LiteLLM's."""
    from openai.types.decision import AnswerAnswerResourcePredicate

    with pytest.raises(ResponseError, match="this answer carries no `uncertainty`"):
        uncertainty_of(AnswerAnswerResourcePredicate(type="predicate", probability=0.5))


def test_uncertainty_where_litellm_puts_it(stub: Any) -> None:
    with OpenAI(base_url=stub.url, api_key="none") as client:
        reply = client.chat.completions.create(
            model="sentiment", messages=CHAT, extra_body={"uncertainty": {"answers": ["a", "b"]}}
        )
    body = reply.model_dump()
    body["choices"][0]["provider_specific_fields"] = {"uncertainty": body["choices"][0].pop("uncertainty")}
    moved = ChatCompletion.model_validate(body)
    assert uncertainty_of(moved) == uncertainty_of(reply) == [uncertainty_of(moved.choices[0])]
    body["choices"][0]["provider_specific_fields"] = None
    assert uncertainty_of(ChatCompletion.model_validate(body)) == []
