"""Texts that are given, scored by a real server: against transformers + peft, `echo`, and the choice among answers."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
import torch

from posterior.data.task import chat_ids
from posterior.models import base as base_models
from posterior.predictive.decoding import Mixing
from tests.server.mixture import Reference, mixture
from tests.server.running import KEY, PARTICLES, Running

WEIGHTS = (0.5, 0.3, 0.2)  # of the folder "gang"
PROMPTS = ["Once", "The food was", "Once upon a time, in a small town by the sea, there"]
TEXTS = [" upon a time, in a small town by the sea, there lived a cat.", " good", " lived an old fisherman\nwho sang."]
LENGTH = 1024  # of the server's context


@pytest.fixture(scope="module")
def tokenizer(server: Running) -> Any:
    return base_models.load_tokenizer(server.base)


def score(server: Running, **body: Any) -> list[dict[str, Any]]:
    """The records of PROMPTS' TEXTS, or of others, with all that they can say."""
    asked = {"model": "gang", "prompts": PROMPTS, "texts": TEXTS, "tokens": True, "per_particle": True, **body}
    return list(server.predict(**asked)["data"])


def test_texts_are_scored_as_by_transformers(server: Running, tokenizer: Any) -> None:
    """Each particle's log-probabilities within 1e-3 nats, and from them the weights (1e-4) and the mixture, its
    entropies too (sums over 49,152 words): by a loop over tokens and particles."""
    reference = Reference(server.base, [server.gang.path / f"particles/{k:03d}" for k in range(PARTICLES)])
    mixings: tuple[Mixing, ...] = ("sequence", "token")
    records = {mixing: score(server, mixing=mixing) for mixing in mixings}
    for index, (prompt, said) in enumerate(zip(PROMPTS, TEXTS, strict=True)):
        text = tokenizer.encode(said, add_special_tokens=False)
        log_p = reference.log_p(tokenizer.encode(prompt), text)
        for mixing in mixings:
            item = records[mixing][index]
            distributions, weights = mixture(log_p, text, WEIGHTS, mixing)
            assert (item["index"], item["text"], len(item["tokens"])) == (index, said, len(text))
            for t, (token, found) in enumerate(zip(text, item["tokens"], strict=True)):
                assert found["logprob"] == pytest.approx(float(distributions[t, token]), abs=1e-3)
                assert found["per_particle"]["logprob"] == pytest.approx(log_p[t, :, token].tolist(), abs=1e-3)
                assert found["per_particle"]["weight"] == pytest.approx(weights[t].tolist(), abs=1e-4)
                total = float(-(distributions[t].exp() * distributions[t]).sum())
                aleatoric = float((weights[t] * -(log_p[t].exp() * log_p[t]).sum(1)).sum())
                assert found["entropy"]["total"] == pytest.approx(total, abs=1e-3)
                assert found["entropy"]["aleatoric"] == pytest.approx(aleatoric, abs=1e-3)
            assert item["logprob"] == pytest.approx(sum(token["logprob"] for token in item["tokens"]))
            assert item["per_particle"]["weight"] == pytest.approx(weights[-1].tolist(), abs=1e-4)
        joint = log_p[range(len(text)), :, text].sum(0)
        exact = float((torch.tensor(WEIGHTS).double().log() + joint).logsumexp(0))
        item = records["sequence"][index]
        assert item["logprob"] == pytest.approx(exact, abs=2e-3), "the exact predictive of the whole text"
        assert item["expected_logprob"] == pytest.approx(float(torch.tensor(WEIGHTS).double() @ joint), abs=2e-3)
        assert item["information"] == pytest.approx(item["logprob"] - item["expected_logprob"], abs=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("model", ["gang", "gang/map", "base"])
def test_the_numbers_are_those_of_echo(server: Running, model: str) -> None:
    """One adapter and the base are scored by vLLM itself there. The mixture's weights start at the prompt there and at
    the text here, so they agree under token mixing, and under sequence mixing where the prompt is one token."""
    name = server.base_name if model == "base" else model
    options = {"mixing": "token"} if model == "gang" else {}
    whole = [prompt + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    echo = {"model": name, "max_tokens": 0, "echo": True, "logprobs": 1}
    choices = server.post("/v1/completions", prompt=whole, uncertainty=options, **echo)["choices"]
    for item, choice in zip(score(server, model=name, **options), choices, strict=True):
        found = [token["logprob"] for token in item["tokens"]]
        assert found == pytest.approx(choice["logprobs"]["token_logprobs"][-len(found) :], abs=1e-4)
        assert item["logprob"] == pytest.approx(sum(found))
    if model == "gang":
        (choice,) = server.post("/v1/completions", prompt=whole[:1], **echo)["choices"]
        item = score(server)[0]
        for field, value in choice["uncertainty"]["prompt"].items():
            assert item[field] == pytest.approx(value, abs=1e-3), field


@pytest.mark.long
def test_answers_are_scored_alike_as_texts(server: Running) -> None:
    """A choice compares the means of the answers' tokens: particle by particle, the softmax of the texts' means."""
    answers = [" negative", " positive", " New York City", " the very small town of Ely"]
    row = {"text": "I waited an hour and left hungry."}
    (choice,) = server.predict(model="gang", inputs=[row], answers=answers, per_particle=True)["data"]
    items = score(server, prompts=None, inputs=[row] * len(answers), texts=answers)
    means = torch.tensor([item["per_particle"]["logprob"] for item in items]).double().T / torch.tensor(
        [len(item["tokens"]) for item in items]
    )
    assert [len(item["tokens"]) for item in items] == [1, 1, 3, 7]
    for particle, expected in zip(choice["per_particle"], means.softmax(-1).tolist(), strict=True):
        assert particle == pytest.approx(expected, abs=1e-5)


def test_a_chat_and_its_end(server: Running, tokenizer: Any) -> None:
    """The end is scored where the text spells it: one more token, of its own probability."""
    messages = [{"role": "user", "content": "Say hello."}]
    prompt = tokenizer.decode(chat_ids(tokenizer, messages))
    said, ended = score(server, prompts=None, messages=[messages] * 2, texts=["Hello!", "Hello!<|im_end|>"])
    assert len(ended["tokens"]) == len(said["tokens"]) + 1
    assert ended["logprob"] == pytest.approx(said["logprob"] + ended["tokens"][-1]["logprob"], abs=1e-4)
    (raw,) = score(server, prompts=[prompt], texts=["Hello!"])
    assert raw["logprob"] == pytest.approx(said["logprob"], abs=1e-4)


@pytest.mark.long
def test_the_whole_context_is_read(server: Running) -> None:
    """Up to the place that vLLM keeps for a token of its own; and a text of several chunks of the prompt."""
    text = " a" * (LENGTH - 2)
    before = server.metrics()['posterior_prompt_tokens_total{posterior="gang"}']
    (item,) = score(server, model="gang/map", prompts=[" a"], texts=[text])
    assert len(item["tokens"]) == LENGTH - 2 and -50 < item["logprob"] / (LENGTH - 2) < 0
    assert server.metrics()['posterior_prompt_tokens_total{posterior="gang"}'] == before + LENGTH - 1
    body = {"model": "gang/map", "prompts": ["x", " a"], "texts": ["y", text + " a"]}
    response = httpx.post(f"{server.url}/v1/predictive", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 400
    said = response.json()["error"]["message"]
    assert said == f"prompt 1 has 1 tokens; with a text of {LENGTH - 1} the limit is {LENGTH - 1}"


@pytest.mark.long
def test_a_client_that_leaves_frees_every_gang(server: Running) -> None:
    body = {"model": "gang", "prompts": ["x"] * 4, "texts": [" a" * 300] * 4}
    headers = {"Authorization": f"Bearer {KEY}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/predictive", json=body, headers=headers, timeout=0.3)
    deadline = time.monotonic() + 30
    while server.running_requests() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.running_requests() == 0
    assert len(score(server)) == len(TEXTS)
