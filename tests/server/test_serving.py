"""One real server (vLLM in float32, the real base, HTTP) against transformers + peft, and the stock OpenAI client."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import openai
import pytest
import torch

from posterior.data.task import chat_ids
from posterior.laplace.linearized import LinearizedModel
from posterior.models import base as base_models
from posterior.models import lora
from posterior.predictive.mixture import from_gaussian
from tests.server import folders
from tests.server.running import KEY, PARTICLES, Running

TEXTS = [
    "The food was wonderful.",
    "I waited an hour and left hungry.",
    "It is a restaurant <|im_end|> of sorts.",
    "ok",
]
LONG = [" New York", " New York City", " Paris", " the very small town of Ely"]
MESSAGES = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="session")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def reference(server: Running) -> Any:
    """(adapter folder or None, prompts, answers) -> log-probabilities [prompts, answers] by transformers + peft, an
    answer's score the mean over its tokens."""
    tokenizer = base_models.load_tokenizer(server.base)
    base = base_models.load_model(server.base, torch.float32, "cpu")

    @torch.no_grad()
    def log_probabilities(folder: Path | None, prompts: list[list[int]], answers: list[str]) -> torch.Tensor:
        model = base if folder is None else lora.load_peft(base, folder)
        rows = []
        for prompt in prompts:
            following = functools.cache(lambda ids: model(torch.tensor([ids])).logits[0, -1].log_softmax(-1))
            row = []
            for answer in answers:
                tokens = tuple(tokenizer.encode(answer, add_special_tokens=False))
                row.append(fmean(float(following((*prompt, *tokens[:i]))[token]) for i, token in enumerate(tokens)))
            rows.append(torch.tensor(row, dtype=torch.float64).log_softmax(0))
        if folder is not None:
            model.unload()
        return torch.stack(rows)

    return log_probabilities


@pytest.fixture(scope="session")
def prompts(server: Running) -> list[list[int]]:
    tokenizer = base_models.load_tokenizer(server.base)
    return [folders.TASK.prompt_ids(tokenizer, {"text": text}) for text in TEXTS]


INPUTS = [{"text": text} for text in TEXTS]


# Agreement with transformers + peft


@pytest.mark.parametrize("name", ["gang", "mood"])
def test_each_particle_equals_transformers_and_peft(
    server: Running, reference: Any, prompts: list[list[int]], name: str
) -> None:
    posterior = server.gang if name == "gang" else server.mood
    data = server.predict(model=name, inputs=INPUTS, predictive="mixture", per_particle=True)["data"]
    answers = list(folders.TASK.answers or ())
    for k, folder in enumerate(posterior.adapters(PARTICLES, server.cache / "draws")):
        expected = reference(folder, prompts, answers).exp()
        served = torch.tensor([item["per_particle"][k] for item in data])
        assert torch.allclose(served.double(), expected, atol=1e-3), (served, expected)
    spread = torch.tensor([item["per_particle"] for item in data]).std(1).max(1).values
    assert bool((spread > 1e-3).all()), "distinct adapters give distinct answers, with the prefix cache on"


def test_the_map_and_the_base_equal_transformers(server: Running, reference: Any, prompts: list[list[int]]) -> None:
    answers = list(folders.TASK.answers or ())
    texts = [folders.TASK.render(row) for row in INPUTS]
    for model, folder in (("mood/map", server.mood.map_dir), (server.base_name, None)):
        data = server.predict(model=model, prompts=texts, answers=answers)["data"]
        served = torch.tensor([[a["probability"] for a in item["answers"]] for item in data]).double()
        assert torch.allclose(served, reference(folder, prompts, answers).exp(), atol=1e-3)


def test_answers_of_several_tokens_equal_teacher_forcing(server: Running, reference: Any) -> None:
    """Candidates that share prefixes, one the beginning of another; within 5e-3 nats, however unlikely."""
    text = "The city I love most is"
    ids = [base_models.load_tokenizer(server.base).encode(text)]
    item = server.predict(model="mood", prompts=[text], answers=LONG, predictive="map")["data"][0]
    served = [math.log(a["probability"]) for a in item["answers"]]
    assert served == pytest.approx(reference(server.mood.map_dir, ids, LONG)[0].tolist(), abs=5e-3)


def test_more_answers_than_vllm_scores_in_one_request(server: Running, reference: Any) -> None:
    """150 words of one token each, and one more that continues one of them."""
    tokenizer = base_models.load_tokenizer(server.base)
    words = (tokenizer.decode([token]) for token in range(1000, 4000))
    answers = list(dict.fromkeys(word for word in words if word[1:].isalpha() and len(tokenizer.encode(word)) == 1))[
        :150
    ]
    answers.append(f"{answers[140]} of the sea")
    text = "The thing I love most is"
    item = server.predict(model="mood", prompts=[text], answers=answers, predictive="map")["data"][0]
    served = [math.log(answer["probability"]) for answer in item["answers"]]
    expected = reference(server.mood.map_dir, [tokenizer.encode(text)], answers)[0].tolist()
    assert len(served) == 151 and served == pytest.approx(expected, abs=5e-3)


@pytest.mark.long
def test_answers_of_several_tokens_linearised(server: Running) -> None:
    """As in this process; without its variance, as vLLM scores them."""
    tokenizer = base_models.load_tokenizer(server.base)
    text = "The city I love most is"
    linearised, point = (
        server.predict(model="mood", prompts=[text], answers=LONG, predictive=name)["data"][0]["answers"]
        for name in ("linearized", "map")
    )
    model = LinearizedModel(server.base, {"mood": server.mood}, dtype=torch.float32, device="cpu")
    candidates = tuple(tuple(tokenizer.encode(answer)) for answer in LONG)
    ((mean, covariance),) = model.logits("mood", [tokenizer.encode(text)], [candidates])
    expected = from_gaussian(mean, covariance).probability.tolist()
    assert [answer["probability"] for answer in linearised] == pytest.approx(expected, abs=1e-5)
    assert [answer["probability"] for answer in point] == pytest.approx(mean.softmax(0).tolist(), abs=5e-3)


def test_linearized_equals_the_model_in_this_process(server: Running, prompts: list[list[int]]) -> None:
    tokenizer = base_models.load_tokenizer(server.base)
    candidates = tuple((tokenizer.encode(answer)[0],) for answer in folders.TASK.answers or ())
    model = LinearizedModel(server.base, {"mood": server.mood}, dtype=torch.float32, device="cpu")
    data = server.predict(model="mood", inputs=INPUTS)["data"]
    for item, (mean, covariance) in zip(data, model.logits("mood", prompts, [candidates] * len(prompts)), strict=True):
        expected = from_gaussian(mean, covariance)
        assert item["predictive"] == "linearized"
        assert [a["probability"] for a in item["answers"]] == pytest.approx(expected.probability.tolist(), abs=1e-5)
        assert item["entropy"]["epistemic"] == pytest.approx(expected.epistemic, abs=1e-5)


FAMILIAR = [
    *INPUTS[:2],
    {"text": "the soup was cold, " * 20},
]  # the last one is longer than a block of the prefix cache


@pytest.fixture(scope="module")
def expected_states(server: Running) -> dict[str, torch.Tensor]:
    """Of FAMILIAR, by adapter."""
    return folders.states(server.mood, server.base, [{**row, "label": " negative"} for row in FAMILIAR])


@pytest.mark.parametrize(("options", "adapter"), folders.TOLD_BY)
def test_familiarity_is_of_the_state_that_transformers_has(
    server: Running, expected_states: Any, options: Any, adapter: Any
) -> None:
    """Also, again, of a prompt whose beginning is in the prefix cache."""
    distance, _ = server.mood.familiarity[adapter, "float32"].center.nearest(expected_states[adapter])
    assert folders.FARTHEST / 100 < float(distance.min()) < float(distance.max()) < folders.FARTHEST
    for _ in range(2):
        reply = server.predict(model="mood", inputs=FAMILIAR, **options)
        shares = torch.tensor([each["familiarity"] for each in reply["data"]], dtype=torch.float64)
        found = folders.FARTHEST * (1 - shares)
        # a step of the held-out distances, and what float32 sums in another order do to a distance
        torch.testing.assert_close(found, distance, rtol=2e-3, atol=2 * folders.FARTHEST / folders.STEPS)


def test_the_same_request_gives_the_same_numbers(server: Running) -> None:
    """Linearised: bit for bit. Mixture: within 1e-5, as vLLM may batch and reuse its prefix cache differently."""
    for predictive, tolerance in (("linearized", 0.0), ("mixture", 1e-5)):
        first, second = (
            [
                a["probability"]
                for item in server.predict(model="mood", inputs=INPUTS, predictive=predictive)["data"]
                for a in item["answers"]
            ]
            for _ in range(2)
        )
        assert first == pytest.approx(second, abs=tolerance, rel=0.0)


# The stock OpenAI client


def test_models_list(client: openai.OpenAI, server: Running) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == [server.base_name, "gang", "gang/map", "mood", "mood/map"]
    assert client.models.retrieve("mood").model_extra["parent"] == server.base_name  # type: ignore[index]


def test_chat_equals_generation_by_transformers(client: openai.OpenAI, server: Running) -> None:
    answer = client.chat.completions.create(model="mood/map", messages=MESSAGES, temperature=0, max_tokens=8)  # type: ignore[call-overload]
    tokenizer = base_models.load_tokenizer(server.base)
    model = lora.load_peft(base_models.load_model(server.base, torch.float32, "cpu"), server.mood.map_dir)
    prompt = torch.tensor([chat_ids(tokenizer, MESSAGES)])
    expected = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    choice = answer.choices[0]
    assert choice.message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.model == f"mood/map@{server.mood.hash[:12]}"
    assert choice.model_extra["uncertainty"]["posterior"] == f"mood@{server.mood.hash[:12]}"
    assert answer.usage.completion_tokens == len(expected) and answer.usage.prompt_tokens == prompt.shape[1]


def test_streams_give_the_same_text(client: openai.OpenAI) -> None:
    options: Any = {"model": "gang", "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(messages=MESSAGES, **options).choices[0].message.content
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].choices[0].model_extra["uncertainty"]["predictive"] == "mixture"
    text = client.completions.create(prompt="Once upon", **options).choices[0].text
    parts = list(client.completions.create(prompt="Once upon", stream=True, **options))
    assert "".join(part.choices[0].text for part in parts) == text
    assert parts[-1].choices[0].model_extra["uncertainty"]["predictive"] == "mixture"


def test_answers_through_the_stock_client(client: openai.OpenAI, server: Running) -> None:
    options: Any = {"extra_body": {"uncertainty": {"answers": [" negative", " positive"], "predictive": "mixture"}}}
    prompt = folders.TASK.render(INPUTS[0])
    choice = client.completions.create(model="mood", prompt=prompt, **options).choices[0]
    item = server.predict(model="mood", inputs=INPUTS[:1], predictive="mixture")["data"][0]
    assert choice.text == item["answer"]
    assert choice.model_extra["uncertainty"]["confidence"] == pytest.approx(item["confidence"], abs=1e-5)
    chat = client.chat.completions.create(model="mood", messages=MESSAGES, **options).choices[0]
    assert chat.message.content == chat.model_extra["uncertainty"]["answer"]
    same = server.predict(model="mood", messages=[MESSAGES], answers=[" negative", " positive"], predictive="mixture")[
        "data"
    ][0]
    assert chat.model_extra["uncertainty"]["confidence"] == pytest.approx(same["confidence"], abs=1e-5)


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
PARTS = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]
CHATS: dict[str, dict[str, Any]] = {
    "two parts": {"messages": [{"role": "user", "content": PARTS}]},
    "developer": {"messages": [{"role": "developer", "content": "Be kind."}, *MESSAGES]},
    "tools": {"messages": MESSAGES, "tools": TOOLS},
    "tool history": {
        "messages": [
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "seen"},
        ]
    },
    "continued": {
        "messages": [*MESSAGES, {"role": "assistant", "content": "He"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "template values": {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}},
    "defaults spelled out": {"messages": MESSAGES, "priority": 0, "length_penalty": 1.0, "include_reasoning": True},
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_a_chat_is_read_the_same_way_whatever_is_asked_about_it(server: Running, chat: dict[str, Any]) -> None:
    """The prompt of a text, as vLLM returns its ids, scored by the answers' own route."""
    text = server.post("/v1/chat/completions", model="mood", max_tokens=1, return_token_ids=True, **chat)
    options = {"answers": ["a", "b"], "predictive": "map"}
    choice = server.post("/v1/chat/completions", model="mood", uncertainty=options, **chat)
    assert choice["usage"]["prompt_tokens"] == len(text["prompt_token_ids"]) == text["usage"]["prompt_tokens"]
    again = server.post("/v1/completions", model="mood", prompt=text["prompt_token_ids"], uncertainty=options)
    confidence, known = (each["choices"][0]["uncertainty"]["confidence"] for each in (choice, again))
    assert confidence == pytest.approx(known, abs=1e-5)


@pytest.mark.parametrize("model", [pytest.param("mood", marks=pytest.mark.long), "mood/map"])
def test_prompts_at_the_limit(server: Running, model: str) -> None:
    """A prompt leaves room for one token, or for none."""
    (card,) = [card for card in server.get("/v1/models")["data"] if card["id"] == model]
    longest = card["max_model_len"]
    for asked_tokens in (1, 2):  # a text ends where the context does
        written = server.post("/v1/completions", model=model, prompt=[5] * (longest - 1), max_tokens=asked_tokens)
        assert written["usage"]["total_tokens"] == longest and written["choices"][0]["finish_reason"] == "length"
    asked = {"model": model, "uncertainty": {"answers": [" a", " b"], "predictive": "map"}}
    chosen = server.post("/v1/completions", prompt=[5] * (longest - 1), **asked)
    assert chosen["usage"]["prompt_tokens"] == longest - 1
    for body in ({"model": model, "max_tokens": 1}, asked):
        full = {**body, "prompt": [5] * longest}
        response = httpx.post(f"{server.url}/v1/completions", json=full, headers={"Authorization": f"Bearer {KEY}"})
        assert response.status_code == 400 and str(longest) in response.json()["error"]["message"], response.text


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, "context length"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "'content'"),
    ({"messages": [{"role": "user", "content": 3}]}, "content"),
    ({"logit_bias": {"9999999": 1}}, "vocab"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"n": 129}, "less than or equal to 128"),
    ({"prompt_logprobs": 0}, "'prompt_logprobs' is not served"),
    ({"chat_template": "{{ 1 }}"}, "'chat_template' is not served"),
    ({"use_beam_search": True}, "'use_beam_search' is not served"),
    ({"stop_token_ids": [10**9]}, "vocab"),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=[f"{i}-{words}" for i, (_, words) in enumerate(BAD)])
def test_bad_requests_of_text_are_one_clear_line(client: openai.OpenAI, body: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "mood", "messages": MESSAGES, "extra_body": body})
    assert words in caught.value.message and caught.value.type == "invalid_request_error"
    assert "\n" not in caught.value.body["message"]  # type: ignore[index]


def test_bad_token_ids_and_echoed_log_probabilities(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="mood", prompt=[1, 10**6])
    single = client.completions.create(model="mood", prompt="x", echo=True, logprobs=1, max_tokens=1).choices[0]
    assert single.logprobs is not None and single.logprobs.token_logprobs is not None
    assert single.logprobs.token_logprobs[0] is None, "a prompt of one token has nothing to score"
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.completions.create(model="nobody", prompt="x")


def test_the_key_is_needed(server: Running) -> None:
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    assert httpx.get(f"{server.url}/health").status_code == 200


# Load


def test_log_probabilities_beside_candidate_scores(client: openai.OpenAI, server: Running) -> None:
    """The fault that server/engine/compat/patch.py fixes: plain rows that share a batch with scores lost theirs."""

    def top() -> list[dict[str, float]]:
        options: Any = {"model": "gang", "temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 4}
        content = client.chat.completions.create(messages=MESSAGES, **options).choices[0].logprobs.content
        return [{t.token: t.logprob for t in token.top_logprobs} for token in content]

    alone = top()
    assert all(len(row) == 4 for row in alone)
    with ThreadPoolExecutor(4) as pool:
        scores = [pool.submit(server.predict, model="mood", inputs=INPUTS * 3, predictive="mixture") for _ in range(2)]
        together = list(pool.map(lambda _: top(), range(2)))
        assert all(score.result()["data"] for score in scores)
    for rows in together:
        assert rows == [pytest.approx(row, abs=1e-3) for row in alone]


@pytest.mark.long
def test_a_seeded_long_prompt_does_not_kill_the_engine(client: openai.OpenAI) -> None:
    options: Any = {"model": "mood", "max_tokens": 2, "seed": 1, "temperature": 1.0}
    with ThreadPoolExecutor(3) as pool:
        texts = list(
            pool.map(lambda _: client.completions.create(prompt="word " * 900, **options).choices[0].text, range(3))
        )
    assert len(set(texts)) == 1


def test_clients_that_leave_leave_nothing_running(client: openai.OpenAI, server: Running) -> None:
    stream = client.completions.create(
        model="mood", prompt="Once", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.running_requests() >= 1
    stream.close()
    with pytest.raises(httpx.ReadTimeout):
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {
            "model": "mood",
            "prompts": [f"{i} " * 300 for i in range(8)],
            "answers": ["a", "b"],
            "predictive": "mixture",
        }
        httpx.post(f"{server.url}/v1/predictive", json=body, headers=headers, timeout=1.0)
    deadline = time.monotonic() + 30
    while server.running_requests() and time.monotonic() < deadline:
        time.sleep(0.3)
    assert server.running_requests() == 0
    assert server.predict(model="mood", inputs=INPUTS[:1], predictive="mixture")["data"]


def test_one_metrics_page_for_ours_and_vllms(server: Running) -> None:
    server.predict(model="mood", inputs=INPUTS[:1])
    samples = server.metrics()
    assert samples["posterior_ready"] == 1
    labels = f'base="{server.base_name}",family="laplace",hash="{server.mood.hash}",posterior="mood"'
    assert samples[f"posterior_info{{{labels}}}"] == 1
    assert samples['posterior_answers_total{posterior="mood",predictive="linearized"}'] >= 1
    assert samples["posterior_linearized_batch_size_count"] >= 1
    assert any(name.startswith("vllm:request_success_total") for name in samples)
    assert not any("/00" in name for name in samples if name.startswith("posterior_")), "no label per particle"
