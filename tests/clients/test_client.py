"""The Python client against a server on a real socket. Sync and async are twins: every call runs through both."""

import asyncio
import dataclasses
import inspect
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import posterior_client
import pytest
from openai import OpenAI
from posterior_client import (
    AsyncPosteriorClient,
    AuthenticationError,
    InputError,
    InvalidRequestError,
    ModelNotFoundError,
    PosteriorClient,
    PosteriorClientError,
    Prediction,
    PredictiveResponse,
    ResponseError,
    ServerError,
    Uncertainty,
    UnreachableError,
    uncertainty_of,
)
from posterior_client._exceptions import translated

ANSWERS = {"uncertainty": {"answers": [" negative", " positive"]}}
CHAT: list[Any] = [{"role": "user", "content": "was it good?"}]


def sync_predictive(options: dict[str, Any], **request: Any) -> PredictiveResponse:
    with PosteriorClient(**options) as client:
        return client.predictive(**request)


def async_predictive(options: dict[str, Any], **request: Any) -> PredictiveResponse:
    async def ask() -> PredictiveResponse:
        async with AsyncPosteriorClient(**options) as client:
            return await client.predictive(**request)

    return asyncio.run(ask())


Call = Callable[..., PredictiveResponse]


@pytest.fixture(params=[sync_predictive, async_predictive], ids=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    return request.param


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"inputs": [{"text": "a\ud83d"}]}, "inputs holds '.ud83d', half of a character"),
        ({"inputs": [{"\udce9": "a"}]}, "inputs holds"),
        ({"prompts": ["good", "\udce9"]}, "prompts holds"),
        ({"messages": [[{"role": "user", "content": [{"type": "text", "text": "\udce9"}]}]]}, "messages holds"),
        ({"prompts": ["good"], "answers": [" yes", "\udce9"]}, "answers holds"),
        ({"prompts": ["good"], "coverage": float("nan")}, "coverage is nan; give a finite number"),
    ],
)
def test_what_cannot_be_sent_is_not_sent(call: Call, stub: Any, request_: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call({"base_url": stub.url}, model="sentiment", **request_)
    assert isinstance(caught.value, PosteriorClientError | ValueError) and stub.bodies == []


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "http://[::1"},
        {"base_url": "http://127.0.0.1:x/v1"},
        {"base_url": "http://\udce9/v1"},
        {"base_url": "http://127.0.0.1:9/v1", "api_key": "ключ"},
        {"base_url": "http://127.0.0.1:9/v1", "api_key": "a\nb"},
    ],
)
def test_addresses_and_keys_that_are_none(call: Call, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="base URL|API key"):
        call(options | {"max_retries": 0}, model="m", prompts=["x"])


def public(module: Any) -> set[str]:
    return {name for name in vars(module) if not name.startswith("_") and not inspect.ismodule(vars(module)[name])}


def test_all_equals_the_public_members() -> None:
    assert posterior_client.__all__ == sorted(public(posterior_client))


def test_the_drawing_shows_every_exception() -> None:
    drawing = posterior_client._exceptions.__doc__
    for name in public(posterior_client):
        kind = getattr(posterior_client, name)
        if inspect.isclass(kind) and issubclass(kind, PosteriorClientError):
            assert f"{name} " in drawing or f"{name}\n" in drawing


@pytest.mark.parametrize("method", ["__init__", "predictive", "score_texts"])
def test_the_twins_take_the_same_arguments(method: str) -> None:
    twins = [inspect.signature(getattr(kind, method)) for kind in (PosteriorClient, AsyncPosteriorClient)]
    assert twins[0] == twins[1]


def test_predictive(call: Call, stub: Any) -> None:
    response = call({"base_url": stub.url}, model="sentiment", inputs=[{"text": "good"}, {"text": "bad"}])
    assert (response.model, response.predictive, response.particles) == ("sentiment", "linearized", 8)
    assert (len(response.data), response.usage.prompt_tokens) == (2, 14)
    first = response.data[0]
    assert (first.answer, first.confidence, first.calibrated) == (" positive", 0.75, False)
    assert (first.posterior, first.predictive, first.particles) == (response.posterior, "linearized", 8)
    assert first.answers[0].interval == (0.125, 0.5)
    assert first.covariance == ((0.01, -0.01), (-0.01, 0.01))
    assert first.entropy.epistemic_share == pytest.approx(0.1108, abs=1e-4)
    assert first.per_particle is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.answer = " negative"  # type: ignore[misc]


def test_only_what_was_said_is_sent(call: Call, stub: Any) -> None:
    call({"base_url": stub.url}, model="sentiment", prompts=["a"])
    options = {"answers": [" a", " b"], "predictive": "mixture", "particles": 4, "per_particle": True, "coverage": 0.5}
    response = call({"base_url": stub.url}, model="sentiment", messages=[CHAT], **options)
    assert stub.bodies == [
        {"model": "sentiment", "prompts": ["a"]},
        {"model": "sentiment", "messages": [CHAT]} | options,
    ]
    assert response.data[0].per_particle == ((0.2, 0.8),) * 8


def test_the_server_s_message_surfaces_unchanged(call: Call, stub: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        call({"base_url": stub.url}, model="sentiment", inputs=[{"review": "good"}])
    assert str(refused.value) == "unknown field ['review']; the task has the field `text`"
    assert (refused.value.status, refused.value.type) == (400, "invalid_request_error")
    with pytest.raises(ModelNotFoundError, match="^no model `other` is served$") as missing:
        call({"base_url": stub.url}, model="other", prompts=["a"])
    assert missing.value.code == "model_not_found"


def test_authentication(call: Call, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.key = "right"
    with pytest.raises(AuthenticationError, match="^a valid API key is needed$"):
        call({"base_url": stub.url, "api_key": "wrong"}, model="sentiment", prompts=["a"])
    call({"base_url": stub.url, "api_key": "right"}, model="sentiment", prompts=["a"])
    monkeypatch.setenv("POSTERIOR_API_KEY", "right")
    monkeypatch.setenv("POSTERIOR_BASE_URL", stub.url)
    call({}, model="sentiment", prompts=["a"])


def test_openai_s_own_key_is_never_sent(call: Call, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-someone-else")
    call({"base_url": stub.url}, model="sentiment", prompts=["a"])
    assert "secret-of-someone-else" not in str(stub.headers)


def test_a_server_not_ready_is_tried_again(call: Call, stub: Any) -> None:
    assert len(call({"base_url": stub.url}, model="busy", prompts=["a"]).data) == 1
    assert len(stub.bodies) == 3
    stub.bodies.clear()
    with pytest.raises(ServerError, match="^warming up$") as busy:
        call({"base_url": stub.url, "max_retries": 0}, model="busy", prompts=["a"])
    assert busy.value.status == 503


def test_no_server(call: Call) -> None:
    with socket.socket() as taken:  # bound but not listening: nothing can answer here
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(UnreachableError, match=f"^no server answers at {url}$"):
            call({"base_url": url, "max_retries": 0}, model="sentiment", prompts=["a"])


def test_a_silent_server(call: Call) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(UnreachableError, match="did not answer in time"):
            call({"base_url": url, "max_retries": 0, "timeout": 0.2}, model="sentiment", prompts=["a"])


def test_an_answer_that_is_not_a_predictive(call: Call, stub: Any) -> None:
    with pytest.raises(ResponseError, match="unreadable `id`"):
        call({"base_url": stub.url}, model="broken", prompts=["a"])


@pytest.fixture
def openai(stub: Any) -> OpenAI:
    return OpenAI(base_url=stub.url, api_key="none")


def test_uncertainty_of_a_completion(openai: OpenAI) -> None:
    response = openai.completions.create(model="sentiment", prompt="it was", extra_body=ANSWERS)
    [found] = uncertainty_of(response)
    assert isinstance(found, Prediction) and found.confidence == 0.75
    assert found == uncertainty_of(response.choices[0])


def test_uncertainty_of_a_chat(openai: OpenAI) -> None:
    response = openai.chat.completions.create(model="sentiment", messages=CHAT, extra_body=ANSWERS)
    [found] = uncertainty_of(response)
    assert isinstance(found, Prediction) and found == uncertainty_of(response.choices[0])


def test_uncertainty_of_stream_chunks(openai: OpenAI) -> None:
    chat = openai.chat.completions.create(model="sentiment", messages=CHAT, extra_body=ANSWERS, stream=True)
    text = openai.completions.create(model="sentiment", prompt="it was", extra_body=ANSWERS, stream=True)
    for stream in (chat, text):
        found = [uncertainty_of(chunk) for chunk in stream]
        assert found[0] == [] and isinstance(found[1][0], Prediction)


def test_uncertainty_of_text_by_the_map(openai: OpenAI) -> None:
    response = openai.completions.create(model="sentiment", prompt="it was")
    assert uncertainty_of(response) == [
        Uncertainty(posterior="sentiment@0123456789ab", predictive="map", calibrated=False)
    ]


def test_uncertainty_of_the_base_model(openai: OpenAI) -> None:
    response = openai.completions.create(model="base", prompt="it was")
    assert uncertainty_of(response) == []
    with pytest.raises(ResponseError, match="carries no `uncertainty`"):
        uncertainty_of(response.choices[0])


def test_the_client_s_openai_is_the_stock_client(stub: Any) -> None:
    with PosteriorClient(stub.url) as client:
        assert [model.id for model in client.openai.models.list()] == ["base", "sentiment/map", "sentiment"]

    async def names() -> list[str]:
        async with AsyncPosteriorClient(stub.url) as client:
            return [model.id async for model in client.openai.models.list()]

    assert asyncio.run(names()) == ["base", "sentiment/map", "sentiment"]


def test_the_readme_s_code_runs(stub: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("POSTERIOR_BASE_URL", stub.url)
    readme = (Path(__file__).parents[2] / "clients" / "python" / "README.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.startswith(" positive 0.75 0.06")


@pytest.mark.parametrize("error", [ValueError, TypeError, AttributeError, KeyError])
def test_what_is_no_posterior_server_is_one_line(error: type[Exception]) -> None:
    with pytest.raises(ResponseError, match="is no Posterior Server$"), translated("http://127.0.0.1:9/v1"):
        raise error("of reading it")
    with pytest.raises(InputError, match="mine"), translated("http://127.0.0.1:9/v1"):
        raise InputError("mine")
