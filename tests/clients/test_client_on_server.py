"""The client against the server's own HTTP code (with a fake engine): what one sends, the other reads."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from posterior_client import (
    AnswerNotFoundError,
    AsyncPosteriorClient,
    AuthenticationError,
    ChoiceAnswer,
    InvalidRequestError,
    ModelNotFoundError,
    Outcome,
    OutcomesResponse,
    PosteriorClient,
    PredicateAnswer,
    Prediction,
    Refusal,
    ScoreAnswer,
    ServerError,
    Text,
    TextPart,
    UncertaintyOptions,
    uncertainty_of,
)

from server.access.keys import Keys
from server.configuration.window import Window
from server.http.app import create_app
from server.metrics import Metrics
from server.services.monitor import Monitor
from server.services.predictive import Service
from server.store.store import Store
from tests.clients.conftest import Ask, serving
from tests.server import fakes
from tests.server.http.test_refusals import with_risk

CHAT: list[Any] = [{"role": "user", "content": "was it good?"}]
ANSWERS = {"uncertainty": {"answers": [" no", " yes"]}}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    parts: Any = (fakes.Engine(max_model_len=4096), fakes.Linearizer(), fakes.Tokenizer())
    folder, metrics = tmp_path_factory.mktemp("outcomes"), Metrics()
    store = Store(f"sqlite:///{folder}/outcomes.db", metrics, share=1.0)
    service = Service(fakes.registry(), *parts, metrics, store=store)
    service.monitor = Monitor(service, store, Window(days=30))
    app = create_app(service, Keys("right"))
    app.state.ready = True
    yield app
    store.close()


@pytest.fixture(scope="module")
def url(app: Any) -> Iterator[str]:
    with serving(app) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[PosteriorClient]:
    with PosteriorClient(url, "right", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(("model", "predictive"), [("mood", "linearized"), ("gang", "mixture"), ("mood/map", "map")])
def test_every_predictive_is_read(client: PosteriorClient, model: str, predictive: str) -> None:
    response = client.predictive(model=model, inputs=[{"text": "good"}, {"text": "bad"}], coverage=0.5)
    assert (response.predictive, len(response.data)) == (predictive, 2)
    first = response.data[0]
    assert first.posterior == response.posterior
    assert first.confidence == max(one.probability for one in first.answers)
    assert first.entropy.total == pytest.approx(first.entropy.aleatoric + first.entropy.epistemic)


def test_the_base_model_has_no_posterior(client: PosteriorClient) -> None:
    response = client.predictive(model="tiny-base", prompts=["it was"], answers=[" no", " yes"])
    assert response.posterior is None and response.data[0].predictive == "map"


def test_particles(client: PosteriorClient) -> None:
    response = client.predictive(model="gang", messages=[CHAT], particles=2, per_particle=True, answers=[" no", " yes"])
    assert response.particles == 2 and len(response.data[0].per_particle or ()) == 2


def test_texts_are_scored(client: PosteriorClient, url: str) -> None:
    request: Any = {"model": "gang", "prompts": ["it", "was"], "texts": [" good", " bad"]}
    scored = client.score_texts(**request, particles=2, mixing="token", tokens=True, per_particle=True)
    assert (scored.posterior, scored.predictive, scored.particles) == ("gang@abcdef012345", "mixture", 2)
    assert [each.text for each in scored.data] == request["texts"]
    for each in scored.data:
        assert (each.posterior, each.mixing, each.particles) == (scored.posterior, "token", 2)
        assert each.logprob == pytest.approx(each.expected_logprob + each.information)
        assert each.per_particle is not None and len(each.per_particle.weight) == 2
        assert len(each.tokens) == len(each.text) and each.tokens[0].per_particle is not None

    async def again() -> Any:
        async with AsyncPosteriorClient(url, "right", max_retries=0) as other:
            return await other.score_texts(**request)

    assert asyncio.run(again()).data == client.score_texts(**request).data
    with pytest.raises(InvalidRequestError, match="a text for each prompt"):
        client.score_texts(model="gang", prompts=["it"], texts=["a", "b"])


def test_uncertainty_of_every_kind_of_response(client: PosteriorClient) -> None:
    chat, text = client.openai.chat.completions, client.openai.completions
    responses = [
        chat.create(model="gang", messages=CHAT, extra_body=ANSWERS),
        text.create(model="gang", prompt="it was", extra_body=ANSWERS),
        [*chat.create(model="gang", messages=CHAT, extra_body=ANSWERS, stream=True)][-1],
        [*text.create(model="gang", prompt="it was", extra_body=ANSWERS, stream=True)][-1],
    ]
    for response in responses:
        [found] = uncertainty_of(response)
        assert isinstance(found, Prediction) and [one.answer for one in found.answers] == [" no", " yes"]


def test_text_under_the_mixture(client: PosteriorClient) -> None:
    extra = {"uncertainty": {"tokens": True, "per_particle": True}}
    [found] = uncertainty_of(client.openai.completions.create(model="mood", prompt="it was", extra_body=extra))
    assert isinstance(found, Text) and found.mixing == "sequence" and found.per_particle is not None
    assert found.logprob == pytest.approx(found.expected_logprob + found.information)
    assert found.tokens[0].entropy.epistemic == 0.25 and found.tokens[0].per_particle is not None
    parts = [
        uncertainty_of(chunk) for chunk in client.openai.completions.create(model="mood", prompt="it was", stream=True)
    ]
    assert type(parts[0][0]) is TextPart and len(parts[0][0].tokens) == 1 and isinstance(parts[-1][0], Text)


@pytest.mark.parametrize("returned", ["meaning", "greedy"])
def test_what_samples_mean(client: PosteriorClient, returned: str) -> None:
    options: Any = {"samples": 3, "return": returned}
    sent: Any = {"model": "gang", "extra_body": {"uncertainty": options}, "max_tokens": 8}
    replies = [
        client.openai.completions.create(prompt="it was", **sent),
        client.openai.chat.completions.create(messages=CHAT, **sent),
        [*client.openai.completions.create(prompt="it was", stream=True, **sent)][-1],
        [*client.openai.chat.completions.create(messages=CHAT, stream=True, **sent)][-1],
    ]
    for reply in replies:
        [found] = uncertainty_of(reply)
        assert isinstance(found, Text) and found.semantic is not None
        assert (found.semantic.samples, found.semantic.returned, found.semantic.own) == (3, returned, 0)
        [meaning] = found.semantic.meanings
        assert (meaning.text, meaning.probability, meaning.samples) == ("hello", 1.0, 3)
        assert found.semantic.entropy.total == 0.0 and found.semantic.others is None


def test_the_values_of_a_text_in_json(client: PosteriorClient, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b'{"ok": true, "name": "x"}'
    draft = fakes.Draft(text.decode(), [[-0.5] * 3] * len(text), tokens=[*text])
    monkeypatch.setattr(app.state.service.engine, "drafts", [draft])
    schema = {"properties": {"ok": {"type": "boolean"}, "name": {"type": "string"}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    sent: Any = {"model": "gang", "messages": CHAT, "extra_body": {"uncertainty": {"fields": True}}}
    [found] = uncertainty_of(client.openai.chat.completions.create(response_format=form, **sent))
    assert isinstance(found, Text) and found.fields is not None
    [ok, name] = found.fields
    assert (ok.path, ok.value, name.path, name.value) == ("/ok", True, "/name", "x")
    assert ok.alternatives is not None and [each.value for each in ok.alternatives] == [True, False]
    assert ok.certainty == ok.alternatives[0].probability and ok.information is None
    assert name.alternatives is None and name.information is not None and name.logprob == pytest.approx(-1)


def test_ask_writes_a_text(url: str, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTERIOR_API_KEY", "right")
    status, shown, said = ask("was it good?", "--write", "--model", "gang", "--max-tokens", "4", url=url)
    text, numbers = shown.split("\n\n")
    assert (status, said) == (0, "") and text
    assert "mean probability of a token" in numbers and "gang@" in numbers and "mixture predictive" in numbers


def test_text_by_the_map(client: PosteriorClient) -> None:
    [found] = uncertainty_of(client.openai.completions.create(model="mood/map", prompt="it was"))
    assert (found.posterior, found.predictive, found.calibrated) == ("mood@abcdef012345", "map", False)
    assert uncertainty_of(client.openai.completions.create(model="tiny-base", prompt="it was")) == []


QUESTIONS: list[Any] = [
    {"type": "predicate", "name": "good", "instructions": "It was good."},
    {"type": "choice", "instructions": "How was it?", "choices": [{"value": "good"}, {"value": True}]},
    {"type": "score", "instructions": "How was it?", "levels": [{"label": "bad"}, {"label": "good"}]},
]


def test_decisions_of_the_stock_client(client: PosteriorClient, url: str) -> None:
    options: Any = {
        "model": "gang", "input": "It was good.", "questions": QUESTIONS,
        "extra_body": {"uncertainty": {"particles": 2, "coverage": 0.5}},
    }  # fmt: skip
    decision = client.openai.decisions.create(**options)
    good, mood, stars = decision.answers
    assert (good.type, good.name, mood.name, stars.type) == ("predicate", "good", None, "score")
    assert mood.type == "choice" and mood.choice in ("good", True)
    assert decision.model == "gang@abcdef012345" and decision.usage.input_tokens > 0
    for answer in decision.answers:
        found = (answer.model_extra or {})["uncertainty"]
        assert found["particles"] == 2 and found["entropy"]["epistemic"] >= 0

    async def again() -> Any:
        async with AsyncPosteriorClient(url, "right", max_retries=0) as other:
            return await other.openai.decisions.create(**options)

    assert asyncio.run(again()).answers == decision.answers


def test_typed_decisions(client: PosteriorClient) -> None:
    options: UncertaintyOptions = {"particles": 2, "coverage": 0.5, "per_particle": True, "orders": 2}
    request: Any = {"model": "gang", "input": "It was good.", "questions": QUESTIONS}
    good, mood, stars = client.decisions(**request, uncertainty=options).answers
    assert isinstance(good, PredicateAnswer) and isinstance(mood, ChoiceAnswer) and isinstance(stars, ScoreAnswer)
    assert [one.answer for one in mood.uncertainty.answers] == ["good", True]
    for answer in (good, mood, stars):
        found = answer.uncertainty
        assert (found.particles, len(found.per_particle or ()), found.reason) == (2, 2, None)
        assert found.orders is not None and found.orders.n == 2
    decision = client.openai.decisions.create(**request)
    assert uncertainty_of(decision) == [answer.uncertainty for answer in client.decisions(**request).answers]


def test_a_refused_decision(client: PosteriorClient, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.state.service.registry.served["gang"].posterior, "calibration", {})
    with_risk(400, app.state.service, split=0.99)
    risk: UncertaintyOptions = {"max_risk": 0.05}
    found = client.decisions(model="gang", input="It was good.", questions=QUESTIONS, uncertainty=risk)
    assert all(isinstance(answer, Refusal) for answer in found.answers)
    for answer in found.answers:
        assert answer.uncertainty.calibrated and answer.uncertainty.calibration is not None
        assert answer.uncertainty.reason in ("ambiguous", "unfamiliar")
        assert set(answer.uncertainty.prediction_set or ()) <= {one.answer for one in answer.uncertainty.answers}


def test_refusals(client: PosteriorClient, app: Any, url: str) -> None:
    with pytest.raises(InvalidRequestError, match="text"):
        client.predictive(model="mood", inputs=[{"review": "good"}])
    with pytest.raises(InvalidRequestError, match="exactly one"):
        client.predictive(model="mood")
    with pytest.raises(ModelNotFoundError, match="'other' is not served here"):
        client.predictive(model="other", prompts=["a"])
    with pytest.raises(AuthenticationError, match="^missing or wrong API key"), PosteriorClient(url, "wrong") as wrong:
        wrong.predictive(model="mood", prompts=["a"])
    app.state.ready = False
    with pytest.raises(ServerError, match="warming up"):
        client.predictive(model="mood", prompts=["a"])
    app.state.ready = True


def test_outcomes(url: str, client: PosteriorClient) -> None:
    id = client.predictive(model="mood", inputs=[{"text": "good"}, {"text": "bad"}]).id
    outcomes: list[Outcome] = [{"id": id, "answer": " positive"}, {"id": id, "index": 1, "correct": False}]
    assert client.predictive(model="mood", inputs=[{"text": "good"}]).data[0].label == "requested"
    first = client.outcomes.report([*outcomes, {"id": "pred-other", "correct": True}])
    assert [each.status for each in first.data] == ["stored", "stored", "unknown"]
    assert [(each.id, each.index) for each in first.data] == [(id, 0), (id, 1), ("pred-other", 0)]
    assert first.data[1].correct is False and first.data[2].message is not None

    found = client.outcomes.summary()
    assert found.window == "30d"
    (own,) = [each for each in found.data if each.posterior.startswith("mood") and each.predictive == "linearized"]
    assert own.outcomes["all"].n == 2 and own.outcomes["requested"].accuracy is not None and own.missing["drift"]

    async def again() -> OutcomesResponse:
        async with AsyncPosteriorClient(url, "right", max_retries=0) as other:
            assert (await other.outcomes.summary()).data
            response = await other.outcomes.report(outcomes)
            await other.outcomes.delete(id)
            return response

    assert [each.status for each in asyncio.run(again()).data] == ["known", "known"]
    with pytest.raises(AnswerNotFoundError, match="no answers of this id"):
        client.outcomes.delete(id)
    with pytest.raises(InvalidRequestError, match="exactly one of 'answer'"):
        client.outcomes.report([{"id": id}])
