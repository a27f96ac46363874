"""Text under the mixture, by a real server, against transformers + peft, and what a client sees of it."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from posterior.models import base as base_models
from posterior.predictive.decoding import Mixing
from tests.server.mixture import Reference, mixture
from tests.server.running import KEY, PARTICLES, Running

WEIGHTS = (0.5, 0.3, 0.2)  # of the folder "gang"
PROMPTS = ["The food was", "Once upon a time, in a small town by the sea, there", "def fibonacci(n):\n", "2 + 2 ="]
TOKENS = 12


@pytest.fixture(scope="module")
def reference(server: Running) -> Reference:
    return Reference(server.base, [server.gang.path / f"particles/{k:03d}" for k in range(PARTICLES)])


@pytest.fixture(scope="module")
def tokenizer(server: Running) -> Any:
    return base_models.load_tokenizer(server.base)


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)


def write(server: Running, prompt: str, mixing: Mixing = "sequence", **body: Any) -> Any:
    """The first choice, with its token ids and everything its uncertainty can say."""
    uncertainty = {"mixing": mixing, "tokens": True, "per_particle": True, **body.pop("uncertainty", {})}
    fields = {"model": "gang", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
    return server.post("/v1/completions", **{**fields, **body, "uncertainty": uncertainty})["choices"][0]


@pytest.mark.parametrize("mixing", ["sequence", "token"])
@pytest.mark.parametrize("prompt", [*PROMPTS[:2], *(pytest.param(p, marks=pytest.mark.long) for p in PROMPTS[2:])])
def test_greedy_text_equals_the_reference(
    server: Running, reference: Reference, tokenizer: Any, prompt: str, mixing: Mixing
) -> None:
    """Same tokens; probabilities and weights within 1e-4, entropies within 1e-3 nats (sums over 49,152 words)."""
    choice = write(server, prompt, mixing)
    text, record = choice["token_ids"], choice["uncertainty"]
    log_p = reference.log_p(tokenizer.encode(prompt), text)
    distributions, weights = mixture(log_p, text, WEIGHTS, mixing)
    assert [int(distribution.argmax()) for distribution in distributions[: len(text)]] == text
    assert len(record["tokens"]) == len(text)
    for t, token in enumerate(record["tokens"]):
        assert math.exp(token["logprob"]) == pytest.approx(float(distributions[t, text[t]].exp()), abs=1e-4)
        assert token["per_particle"]["weight"] == pytest.approx(weights[t].tolist(), abs=1e-4)
        assert token["per_particle"]["logprob"] == pytest.approx(log_p[t, :, text[t]].tolist(), abs=1e-3)
        assert token["effective_particles"] == pytest.approx(1 / float(weights[t].square().sum()), abs=1e-3)
        total = float(-(distributions[t].exp() * distributions[t]).sum())
        aleatoric = float((weights[t] * -(log_p[t].exp() * log_p[t]).sum(1)).sum())
        assert token["entropy"]["total"] == pytest.approx(total, abs=1e-3)
        assert token["entropy"]["aleatoric"] == pytest.approx(aleatoric, abs=1e-3)
        p = log_p[t, :, text[t]].exp()
        variance = float((weights[t] * (p - (weights[t] * p).sum()).square()).sum())
        assert token["epistemic_variance"] == pytest.approx(variance, abs=1e-4)
    whole = float(sum(distributions[t, token] for t, token in enumerate(text)))
    assert record["logprob"] == pytest.approx(whole, abs=1e-3)
    if mixing == "sequence":
        joint = torch.logsumexp(torch.tensor(WEIGHTS).log() + log_p[range(len(text)), :, text].sum(0), 0)
        assert record["logprob"] == pytest.approx(float(joint), abs=1e-3), "the exact predictive of the whole text"
        final = weights[-1].clamp(min=1e-300)
        information = float((torch.tensor(WEIGHTS) * (torch.tensor(WEIGHTS).double() / final).log()).sum())
        assert record["information"] == pytest.approx(information, rel=1e-3, abs=1e-3)
    assert record["logprob"] == pytest.approx(record["expected_logprob"] + record["information"], abs=1e-9)


def test_logprobs_are_those_of_the_mixture(server: Running, reference: Reference, tokenizer: Any) -> None:
    choice = write(server, PROMPTS[0], logprobs=5)
    text = choice["token_ids"]
    distributions, _ = mixture(reference.log_p(tokenizer.encode(PROMPTS[0]), text), text, WEIGHTS, "sequence")
    for t, (logprob, top) in enumerate(
        zip(choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True)
    ):
        assert logprob == pytest.approx(float(distributions[t, text[t]]), abs=1e-3)
        assert sorted(top.values(), reverse=True)[:5] == pytest.approx(
            distributions[t].topk(5).values.tolist(), abs=1e-3
        )


@pytest.mark.long
@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_sampled_pairs_follow_the_analytic_mixture(
    server: Running, reference: Reference, tokenizer: Any, top_p: float
) -> None:
    """Chi-squared over pairs of two tokens out of four allowed ones. Masks act on the mixture: each distribution is the
    mixture cut to the allowed tokens; weights follow the particles' own probabilities: the second
    distribution's have seen the first token."""
    ids, draws = tokenizer.encode(PROMPTS[0]), 256
    allowed = reference.log_p(ids, [])[0].exp().mean(0).topk(4).indices.tolist()
    body = {"model": "gang", "prompt": PROMPTS[0], "max_tokens": 2, "n": 128, "top_p": top_p, "temperature": 1}
    body |= {"allowed_token_ids": allowed, "return_token_ids": True}
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(draws // 128):
        answer = server.post("/v1/completions", **body, seed=1000 * seed)
        counts.update(tuple(choice["token_ids"]) for choice in answer["choices"])
    expected: dict[tuple[int, ...], float] = {}
    for first in allowed:
        distributions, _ = mixture(reference.log_p(ids, [first]), [first], WEIGHTS, "sequence")
        one, two = (
            _nucleus(distribution[allowed].exp() / distribution[allowed].exp().sum(), top_p)
            for distribution in distributions
        )
        for position, second in enumerate(allowed):
            expected[first, second] = draws * float(one[allowed.index(first)] * two[position])
    assert sum(counts[pair] for pair, count in expected.items() if count == 0) == 0, "outside the nucleus"
    possible = sorted((count, counts[pair]) for pair, count in expected.items() if count > 0)
    while len(possible) > 2 and possible[0][0] < 5:  # join rare pairs until the approximation holds
        (e1, n1), (e2, n2), *others = possible
        possible = sorted([(e1 + e2, n1 + n2), *others])
    statistic = torch.tensor(sum((n - e) ** 2 / e for e, n in possible))
    surprise = torch.special.gammainc(torch.tensor((len(possible) - 1) / 2), statistic / 2)
    assert float(surprise) < 0.999, (statistic, expected, counts)


def _nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """p cut to the smallest set of most probable tokens with mass >= top_p, and renormalised."""
    values, order = p.sort(descending=True)
    kept = values.cumsum(0) - values < top_p
    cut = torch.zeros_like(p).scatter(0, order[kept], values[kept])
    return cut / cut.sum()


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 7},
    {"temperature": 0.8, "seed": 8, "top_p": 0.9, "top_k": 40, "min_p": 0.02},
    {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 1.0, "seed": 9, "logit_bias": {"1": -100}, "bad_words": ["the"], "min_tokens": 5},
]


def test_every_way_of_sampling_is_repeatable_and_free_of_company(server: Running) -> None:
    """Alone, again, and among the others: the same text; the record's numbers are of the mixture whatever was
    masked."""
    alone = [write(server, PROMPTS[1], **options) for options in SAMPLING]
    with ThreadPoolExecutor(8) as pool:
        crowd = list(pool.map(lambda options: write(server, PROMPTS[1], **options), SAMPLING * 2))
    for first, second in zip(alone * 2, crowd, strict=True):
        assert first["token_ids"] == second["token_ids"]
        assert first["uncertainty"]["logprob"] == pytest.approx(second["uncertainty"]["logprob"], abs=1e-3)
    assert len({tuple(choice["token_ids"]) for choice in alone}) == len(SAMPLING)


def test_n_choices_stop_strings_and_lengths(server: Running) -> None:
    body = {"model": "gang", "prompt": PROMPTS[1], "n": 3, "max_tokens": 12, "temperature": 1, "seed": 3, "stop": ["e"]}
    answer = server.post("/v1/completions", **body, return_token_ids=True, uncertainty={"tokens": True})
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    for choice in answer["choices"]:
        assert "e" not in choice["text"] and len(choice["uncertainty"]["tokens"]) == len(choice["token_ids"])
    assert answer["usage"]["completion_tokens"] == sum(len(c["token_ids"]) for c in answer["choices"])


def test_several_prompts_keep_their_own_uncertainty(server: Running) -> None:
    both = server.post("/v1/completions", model="gang", prompt=PROMPTS[:2], max_tokens=6, temperature=0)["choices"]
    for prompt, choice in zip(PROMPTS, both, strict=False):
        assert choice["uncertainty"]["logprob"] == pytest.approx(
            write(server, prompt, max_tokens=6)["uncertainty"]["logprob"], abs=1e-3
        )


def test_structured_output_and_its_meaning(server: Running) -> None:
    """The grammar masks the mixture; the reported log-probability is that of the mixture before the mask."""
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema}}
    messages = [{"role": "user", "content": "How was the food?"}]
    body = {"model": "gang", "messages": messages, "max_tokens": 40, "temperature": 0}
    answer = server.post("/v1/chat/completions", **body, response_format=form, uncertainty={"tokens": True})
    choice = answer["choices"][0]
    assert json.loads(choice["message"]["content"])["mood"] in ("good", "bad")
    assert choice["uncertainty"]["logprob"] < -1, "a text the mixture would hardly have written by itself"


def test_choices_and_expressions(server: Running) -> None:
    body = {"model": "gang", "prompt": "The food was", "max_tokens": 12, "temperature": 0}
    for form, allowed in (
        ({"choice": ["good", "bad"]}, r"good|bad"),
        ({"regex": r"[0-9]{3}-[0-9]{2}"}, r"\d{3}-\d{2}"),
    ):
        (choice,) = server.post("/v1/completions", **body, structured_outputs=form)["choices"]
        assert re.fullmatch(allowed, choice["text"]) and choice["uncertainty"]["predictive"] == "mixture"


def test_streams_carry_each_chunks_tokens(client: openai.OpenAI, server: Running) -> None:
    whole = write(server, PROMPTS[1])
    options: Any = {"model": "gang", "prompt": PROMPTS[1], "max_tokens": TOKENS, "temperature": 0, "stream": True}
    chunks = list(client.completions.create(**options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole["text"]
    parts = [(chunk.choices[0].model_extra or {}).get("uncertainty") for chunk in chunks]
    logprobs = [token["logprob"] for part in parts if part for token in part.get("tokens", [])]
    assert logprobs == pytest.approx([token["logprob"] for token in whole["uncertainty"]["tokens"]], abs=1e-3)
    assert parts[-1]["logprob"] == pytest.approx(whole["uncertainty"]["logprob"], abs=1e-3)
    assert sum("logprob" in part for part in parts if part) == 1, "the summary comes once, at the end"


def test_particles_of_one_request(server: Running) -> None:
    single = write(server, PROMPTS[0], uncertainty={"particles": 1})["uncertainty"]
    assert single["particles"] == 1 and single["information"] == 0.0
    assert single["entropy"]["epistemic"] == pytest.approx(0, abs=1e-3), "rounding, over twelve tokens"
    plain = server.post("/v1/completions", model="gang", prompt="a", max_tokens=2, uncertainty={"particles": 1})
    assert plain["choices"][0]["uncertainty"]["predictive"] == "map", (
        "one particle, nothing else said: the MAP, for free"
    )


@pytest.mark.parametrize(
    ("uncertainty", "message"),
    [
        ({"particles": 4}, "this server holds 3"),
        ({"particles": 0}, "greater than or equal to 1"),
        ({"mixing": "average"}, "mixing"),
        ({"predictive": "map", "mixing": "token"}, "writes with one adapter"),
        ({"answers": ["a", "b"], "mixing": "token"}, "belong to text"),
    ],
)
def test_refusals(server: Running, uncertainty: dict[str, Any], message: str) -> None:
    body = {"model": "gang", "prompt": "a", "uncertainty": uncertainty}
    response = httpx.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_a_client_that_leaves_frees_the_whole_gang(server: Running) -> None:
    body = {"model": "gang", "prompt": PROMPTS[1], "max_tokens": 500, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as http,
        http.stream("POST", f"{server.url}/v1/completions", json=body) as stream,
    ):
        next(stream.iter_lines())
        assert server.running_requests() >= PARTICLES
    deadline = time.monotonic() + 30
    while server.running_requests() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert server.running_requests() == 0
    assert write(server, PROMPTS[0])["finish_reason"] in ("length", "stop")


# Prompts scored under the mixture


@pytest.mark.parametrize("mixing", ["sequence", "token"])
def test_echo_with_logprobs_scores_the_prompt_under_the_mixture(
    server: Running, reference: Reference, tokenizer: Any, mixing: Mixing
) -> None:
    """As lm-evaluation-harness's `local-completions` asks: max_tokens 1, echo, logprobs 1. Within 1e-3 nats."""
    prompt = PROMPTS[1]
    body = {"model": "gang", "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    choice = server.post("/v1/completions", **body, seed=1234, uncertainty={"mixing": mixing})["choices"][0]
    ids = tokenizer.encode(prompt)
    log_p = reference.log_p(ids[:1], ids[1:])
    distributions, weights = mixture(log_p, ids[1:], WEIGHTS, mixing)
    expected = [float(distributions[t, token]) for t, token in enumerate(ids[1:])]
    found = choice["logprobs"]
    assert found["token_logprobs"][0] is None and len(found["token_logprobs"]) == len(ids) + 1
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-3)
    greedy = [max(top, key=top.get) == found["tokens"][t] for t, top in enumerate(found["top_logprobs"]) if t]
    assert greedy[: len(ids) - 1] == [
        int(distribution.argmax()) == token for distribution, token in zip(distributions, ids[1:], strict=False)
    ]
    summary = choice["uncertainty"]["prompt"]
    assert summary["logprob"] == pytest.approx(sum(expected), abs=2e-3)
    assert summary["effective_particles"] == pytest.approx(1 / float(weights[-1].square().sum()), abs=1e-3)
    new = write(server, prompt, mixing, max_tokens=1)
    assert choice["uncertainty"]["logprob"] == pytest.approx(new["uncertainty"]["logprob"], abs=1e-3), (
        "what is generated starts from the posterior's own weights: the prompt is given, not drawn"
    )


def test_echo_without_generation_and_of_one_adapter(server: Running, tokenizer: Any) -> None:
    body = {"prompt": PROMPTS[:3], "max_tokens": 0, "echo": True, "logprobs": 2}
    for model in ("gang", "gang/map", server.base_name):
        for prompt, choice in zip(
            PROMPTS, server.post("/v1/completions", model=model, **body)["choices"], strict=False
        ):
            assert choice["text"] == prompt and len(choice["logprobs"]["tokens"]) == len(tokenizer.encode(prompt))
            assert all(-50 < logprob < 0 for logprob in choice["logprobs"]["token_logprobs"][1:])
