"""Chat and completion requests with a fake engine: text by the MAP, and one of the candidate answers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.errors import Refused
from tests.server import fakes
from tests.server.conftest import error_of

MESSAGES = [{"role": "user", "content": "good?"}]
ANSWERS = [" negative", " positive"]


def chat(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": "mood", "messages": MESSAGES, **body})


def complete(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/completions", json={"model": "mood", "prompt": "good?", **body})


def events(response: Any) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]" and response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line) for line in lines[:-1]]


def test_text_is_by_the_mixture_and_says_so(client: TestClient, engine: fakes.Engine) -> None:
    choice = chat(client).json()["choices"][0]
    assert choice["message"]["content"] == "hello"
    record = choice["uncertainty"]
    assert (record["predictive"], record["mixing"], record["posterior"]) == ("mixture", "sequence", "mood@abcdef012345")
    assert record["logprob"] == pytest.approx(math.log(0.5)) and record["mean_token_probability"] == pytest.approx(0.5)
    assert record["entropy"] == {"total": 1.0, "aleatoric": 0.75, "epistemic": 0.25}
    assert record["calibrated"] is False and "tokens" not in record and "per_particle" not in record
    assert "uncertainty" not in engine.bodies[0]
    assert "uncertainty" not in chat(client, model="tiny-base").json()["choices"][0], "the base has no posterior"


def test_text_by_the_map_on_request(client: TestClient) -> None:
    for body in ({"model": "mood/map"}, {"uncertainty": {"predictive": "map"}}, {"uncertainty": {"particles": 1}}):
        record = chat(client, **body).json()["choices"][0]["uncertainty"]
        assert record == {
            "predictive": "map", "posterior": "mood@abcdef012345", "confidence": None, "calibrated": False,
            "calibration": None,
        }  # fmt: skip


def test_streamed_text_carries_its_tokens_and_the_summary_on_the_last_chunk(client: TestClient) -> None:
    for response in (chat(client, stream=True), complete(client, stream=True)):
        chunks = events(response)
        assert [len(chunk["choices"][0].get("uncertainty", {}).get("tokens", [])) for chunk in chunks] == [1, 0]
        assert chunks[-1]["choices"][0]["uncertainty"]["predictive"] == "mixture"
    silent = events(chat(client, stream=True, uncertainty={"tokens": False}))
    assert "uncertainty" not in silent[0]["choices"][0] and "logprob" in silent[-1]["choices"][0]["uncertainty"]
    mapped = events(chat(client, stream=True, model="mood/map"))
    assert "uncertainty" not in mapped[0]["choices"][0]
    assert mapped[-1]["choices"][0]["uncertainty"]["predictive"] == "map"


def test_text_under_the_linearised_predictive_is_not_served_yet(client: TestClient) -> None:
    error = error_of(chat(client, uncertainty={"predictive": "linearized"}), 400)
    assert "not served yet" in error["message"] and error["param"] == "uncertainty.predictive"


def test_every_token_and_particle_on_request(client: TestClient) -> None:
    record = chat(client, uncertainty={"tokens": True, "per_particle": True, "mixing": "token"}).json()["choices"][0][
        "uncertainty"
    ]
    (token,) = record["tokens"]
    assert token["per_particle"]["logprob"] == pytest.approx([math.log(0.5)] * record["particles"])
    assert sum(token["per_particle"]["weight"]) == pytest.approx(1)
    assert token["epistemic_variance"] == pytest.approx(0, abs=1e-12)


def test_the_text_of_a_choice_is_its_most_probable_answer(client: TestClient) -> None:
    body = chat(client, uncertainty={"answers": ANSWERS}).json()
    choice = body["choices"][0]
    best = max(choice["uncertainty"]["answers"], key=lambda a: a["probability"])
    assert choice["message"]["content"] == choice["uncertainty"]["answer"] == best["answer"]
    assert choice["finish_reason"] == "stop" and choice["uncertainty"]["predictive"] == "linearized"
    assert body["object"] == "chat.completion" and body["usage"]["completion_tokens"] == len(best["answer"])


def test_draws_follow_the_predictive_and_the_seed(client: TestClient) -> None:
    def draws(seed: int, temperature: float = 1.0) -> list[str]:
        options = {"answers": ANSWERS, "predictive": "mixture"}
        body = complete(client, uncertainty=options, temperature=temperature, n=128, seed=seed).json()
        return [choice["text"] for choice in body["choices"]]

    assert draws(1) == draws(1) != draws(2)
    probability = complete(client, uncertainty={"answers": ANSWERS, "predictive": "mixture"}).json()["choices"][0]
    share = probability["uncertainty"]["answers"][0]["probability"]
    seen = [text for seed in range(8) for text in draws(seed)]
    assert seen.count(ANSWERS[0]) / len(seen) == pytest.approx(share, abs=4 * (share * (1 - share) / len(seen)) ** 0.5)
    assert len(set(draws(1, temperature=0.0))) == 1


def test_the_record_is_about_the_text_that_was_drawn(client: TestClient) -> None:
    for choice in complete(client, uncertainty={"answers": ANSWERS}, temperature=5.0, n=16, seed=0).json()["choices"]:
        record = choice["uncertainty"]
        mine = next(a for a in record["answers"] if a["answer"] == choice["text"])
        assert (record["answer"], record["confidence"]) == (choice["text"], mine["probability"])


def test_streamed_answers_say_the_same(client: TestClient) -> None:
    options = {"answers": ANSWERS}
    for send, text in ((chat, lambda c: c["delta"].get("content")), (complete, lambda c: c["text"])):
        whole = send(client, uncertainty=options).json()
        chunks = events(send(client, uncertainty=options, stream=True, stream_options={"include_usage": True}))
        assert (
            "".join(text(c["choices"][0]) or "" for c in chunks if c["choices"])
            == whole["choices"][0]["uncertainty"]["answer"]
        )
        assert chunks[1]["choices"][0]["uncertainty"] == whole["choices"][0]["uncertainty"]
        assert chunks[1]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"] == whole["usage"]


def test_several_prompts_and_token_ids(client: TestClient) -> None:
    body = complete(client, prompt=["a", "b"], n=2, uncertainty={"answers": ANSWERS}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert complete(client, prompt=[1, 2], uncertainty={"answers": ANSWERS}).json()["usage"]["prompt_tokens"] == 2
    assert (
        complete(client, prompt=[[1], [2, 3]], uncertainty={"answers": ANSWERS}).json()["usage"]["prompt_tokens"] == 3
    )


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"uncertainty": {"answer": ["a"]}}, "uncertainty.answer", "unknown field"),
    ({"uncertainty": 3}, "uncertainty", "JSON object"),
    ({"uncertainty": {"answers": []}}, "uncertainty.answers", "at least 2"),
    ({"uncertainty": {"answers": ["a", "a"]}}, "answers", "alike"),
    ({"uncertainty": {"answers": ANSWERS, "particles": 9, "predictive": "mixture"}}, "particles", "holds 8"),
    ({"uncertainty": {"answers": ANSWERS}, "n": 0}, "n", "greater than or equal to 1"),
    ({"uncertainty": {"answers": ANSWERS}, "n": True}, "n", "valid integer"),
    ({"uncertainty": {"answers": ANSWERS}, "temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"uncertainty": {"answers": ANSWERS}, "seed": 1.5}, "seed", "valid integer"),
    ({"uncertainty": {"answers": ANSWERS}, "prompt": []}, "prompt", "1 to 256"),
    ({"uncertainty": {"answers": ANSWERS}, "prompt": {}}, "prompt", "must be a text"),
    ({"uncertainty": {"answers": ANSWERS}, "prompt": [["x"]]}, "prompt", "must be a text"),
    ({"uncertainty": {"answers": ANSWERS}, "prompt": [1, fakes.VOCABULARY]}, None, "outside the vocabulary"),
    ({"uncertainty": {"answers": ANSWERS}, "prompt": [-1, 2]}, "prompt", "must be a text"),
    ({"uncertainty": {"answers": ANSWERS}, "prompt": "x" * 64}, None, "has 64 tokens"),
    ({"uncertainty": {"answers": [f"a{i}" for i in range(128)]}, "n": 65}, None, "numbers in the response"),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD, ids=[f"{i}-{case[2]}" for i, case in enumerate(BAD)])
def test_bad_input(client: TestClient, body: dict[str, Any], param: str | None, words: str) -> None:
    error = error_of(complete(client, **body), 400)
    assert words in error["message"] and error["param"] == param


def test_bad_chat_input(client: TestClient) -> None:
    assert error_of(chat(client, model="nobody"), 404)["code"] == "model_not_found"
    assert error_of(chat(client, model=None), 404)["param"] == "model"
    answers = {"uncertainty": {"answers": ANSWERS}}
    assert error_of(chat(client, messages="hi", **answers), 400)["param"] == "messages"
    assert "'content'" in error_of(chat(client, messages=[{"role": "user"}]), 400)["message"]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]
    assert "must be text" in error_of(chat(client, messages=image), 400)["message"]


def test_errors_of_the_engine_before_and_within_a_stream(client: TestClient, engine: fakes.Engine) -> None:
    engine.failure = Refused("too long", "messages")
    assert error_of(chat(client, stream=True), 400)["message"] == "too long"

    async def broken(*_: Any) -> Any:
        yield 'data: {"error":{"message":"secret","code":500}}\n\n'
        raise RuntimeError("secret too")

    engine.failure, engine._stream = None, broken  # type: ignore[method-assign]
    text = chat(client, stream=True).text
    assert text.count('"type": "server_error"') == 2 and "secret" not in text
