"""Values of structured text by a real server, against transformers + peft and against an enumeration of all texts."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import httpx
import pytest
import torch

from posterior.models import base as base_models
from tests.server.mixture import Reference
from tests.server.running import KEY, PARTICLES, Running

WEIGHTS = (0.5, 0.3, 0.2)  # of the folder "gang"
PROMPT = 'Review: "The food was good, but the service was slow."\nThe review as JSON: '
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "very good", "plutôt/bad"]},
        "again": {"type": "boolean"},
        "dish": {"type": "string", "maxLength": 12},
        "stars": {"type": "integer", "minimum": 0, "maximum": 100},
        "level": {"anyOf": [{"enum": [1, 12]}, {"type": "null"}]},
    },
    "required": ["mood", "again", "dish", "stars", "level"],
    "additionalProperties": False,
}
SENT = {
    "prompt": PROMPT, "max_tokens": 80, "return_token_ids": True,
    "response_format": {"type": "json_schema", "json_schema": {"name": "review", "schema": SCHEMA}},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(server: Running) -> Any:
    return base_models.load_tokenizer(server.base)


@pytest.fixture(scope="module")
def reference(server: Running) -> Reference:
    return Reference(server.base, [server.gang.path / f"particles/{k:03d}" for k in range(PARTICLES)])


def place(tokenizer: Any, ids: list[int], text: str, name: str) -> tuple[int, int]:
    """The tokens that hold a value of TEXT: a string's from behind its first quote to its last, a number's with the
    character after it. By the lengths of what the tokens before decode to."""
    match = re.search(rf'"{name}"\s*:\s*("?)', text)
    assert match is not None
    value = re.compile(r'[^"]*"' if match[1] else r"true|false|(?:\d+|null)[\s,}]").match(text, match.end())
    assert value is not None
    lengths = [len(tokenizer.decode(ids[:count]).rstrip("\ufffd")) for count in range(len(ids) + 1)]
    start = max(t for t in range(len(ids)) if lengths[t] <= value.start())
    stop = min(t for t in range(len(ids) + 1) if lengths[t] >= value.end())
    return start, stop


def joint(reference: Reference, prompt: list[int], text: list[int]) -> list[float]:
    """w_k p_k(text | prompt)."""
    log_p = reference.log_p(prompt, text)[range(len(text)), :, text].sum(0).tolist()
    return [w * math.exp(each) for w, each in zip(WEIGHTS, log_p, strict=True)]


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1, "seed": 5, "max_tokens": 20}], ids=["greedy", "drawn and cut"]
)
def test_a_values_probability_is_that_of_an_enumeration(
    server: Running, reference: Reference, tokenizer: Any, sampling: dict[str, Any]
) -> None:
    """Each alternative by transformers + peft, under each particle, from the prompt on: within 1e-3."""
    sent = {"model": "gang", **SENT, **sampling, "uncertainty": {"fields": True}}
    (choice,) = server.post("/v1/completions", **sent)["choices"]
    ids, text, prompt = choice["token_ids"], choice["text"], tokenizer.encode(PROMPT)
    found = {field["path"].removeprefix("/"): field for field in choice["uncertainty"]["fields"]}
    assert list(found) == SCHEMA["required"][: len(found)] and found, text
    if choice["finish_reason"] == "stop":
        assert {name: field["value"] for name, field in found.items()} == json.loads(text)
    else:
        assert "max_tokens" in sampling and len(found) < len(SCHEMA["required"]), text
    for name, values in (
        ("mood", SCHEMA["properties"]["mood"]["enum"]),
        ("again", [True, False]),
        ("level", [1, 12, None]),
    ):
        if name not in found:
            continue
        start, stop = place(tokenizer, ids, text, name)
        own, shown = tokenizer.decode(ids[start:stop]), json.dumps(found[name]["value"], ensure_ascii=False)
        before, _, after = own.partition(shown.strip('"'))
        spelled = [before + json.dumps(value, ensure_ascii=False).strip('"') + after for value in values]
        whole = [[*ids[:start], *tokenizer.encode(each)] for each in spelled]
        each = [joint(reference, prompt, tokens) for tokens in whole]
        everything = sum(map(sum, each))
        p = [sum(row) / everything for row in each]
        alternatives = found[name]["alternatives"]
        assert [each["value"] for each in alternatives] == values
        assert [each["probability"] for each in alternatives] == pytest.approx(p, abs=1e-3), name
        assert found[name]["probability"] == pytest.approx(p[values.index(found[name]["value"])], abs=1e-3)
        weights = [sum(row[k] for row in each) / everything for k in range(PARTICLES)]
        total = -sum(q * math.log(q) for q in p if q > 0)
        shares = [[row[k] / everything / weights[k] for row in each] for k in range(PARTICLES)]
        aleatoric = -sum(w * q * math.log(q) for w, row in zip(weights, shares, strict=True) for q in row if q > 0)
        expected = {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}
        assert found[name]["entropy"] == pytest.approx(expected, abs=2e-3), name
    for name in {"dish", "stars"} & found.keys():
        start, stop = place(tokenizer, ids, text, name)
        until, at = joint(reference, prompt, ids[:stop]), joint(reference, prompt, ids[:start])
        expected = math.log(sum(until) / sum(at))
        field = found[name]
        assert field["logprob"] == pytest.approx(expected, abs=2e-3) and field["tokens"] == stop - start
        assert field["probability"] == pytest.approx(math.exp(expected), abs=1e-3)
        shares = torch.tensor([u / a for u, a in zip(until, at, strict=True)]).log()
        mean = float((torch.tensor(at) / sum(at) * shares).sum())
        assert field["information"] == pytest.approx(expected - mean, abs=3e-3)


def test_the_numbers_are_the_same_however_the_text_is_sent(server: Running) -> None:
    schema = {"type": "object", "properties": {"again": {"type": "boolean"}}, "required": ["again"]}
    sent = {
        "model": "gang", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "uncertainty": {"fields": True},
    }  # fmt: skip
    (choice,) = server.post("/v1/chat/completions", **sent)["choices"]
    (field,) = choice["uncertainty"]["fields"]
    assert field["path"] == "/again" and f"{field['value']}".lower() in choice["message"]["content"]
    lines = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={**sent, "stream": True},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=120,
    ).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    (streamed,) = chunks[-1]["choices"][0]["uncertainty"]["fields"]
    assert streamed["value"] == field["value"]
    assert streamed["probability"] == pytest.approx(field["probability"], abs=1e-3)
    mapped = server.post("/v1/chat/completions", **{**sent, "model": "mood/map"})["choices"][0]["uncertainty"]
    assert mapped["predictive"] == "map" and mapped["fields"][0]["entropy"]["epistemic"] == 0
