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
        "mood": {"enum": ["good", "plutôt/bad"]},
        "again": {"type": "boolean"},
        "dish": {"type": "string", "maxLength": 12},
        "stars": {"type": "integer", "minimum": 0, "maximum": 100},
        "level": {"anyOf": [{"const": 1}, {"const": 12}]},
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


def joint(reference: Reference, prompt: list[int], text: list[int]) -> list[list[float]]:
    """log of w_k p_k(text up to t | prompt), for t = 0 .. T."""
    log_p = reference.log_p(prompt, text)[range(len(text)), :, text]
    start = torch.tensor(WEIGHTS, dtype=torch.float64).log()[None]
    return list(torch.cat([start, start + log_p.cumsum(0)]).tolist())


def total(logs: list[float]) -> float:
    """log of the sum."""
    return float(torch.tensor(logs, dtype=torch.float64).logsumexp(0))


@pytest.mark.long
def test_a_values_probability_is_that_of_an_enumeration(server: Running, reference: Reference, tokenizer: Any) -> None:
    """Each alternative by transformers + peft, under each particle, from the prompt on: within 1e-3."""
    sent = {"model": "gang", **SENT, "temperature": 0, "uncertainty": {"fields": True}}
    (choice,) = server.post("/v1/completions", **sent)["choices"]
    ids, text, prompt = choice["token_ids"], choice["text"], tokenizer.encode(PROMPT)
    assert choice["finish_reason"] == "stop", text
    found = {field["path"].removeprefix("/"): field for field in choice["uncertainty"]["fields"]}
    assert [(name, field["value"]) for name, field in found.items()] == list(json.loads(text).items())
    assert list(found) == SCHEMA["required"]
    written = joint(reference, prompt, ids)

    listed: dict[str, list[Any]] = {"mood": ["good", "plutôt/bad"], "again": [True, False], "level": [1, 12]}
    for name, values in listed.items():
        field, (start, stop) = found[name], place(tokenizer, ids, text, name)
        shown = json.dumps(field["value"], ensure_ascii=False).strip('"')
        before, _, after = tokenizer.decode(ids[start:stop]).partition(shown)
        logs = []
        for value in values:
            spelled = before + json.dumps(value, ensure_ascii=False).strip('"') + after
            whole = [*ids[:start], *tokenizer.encode(spelled)]
            logs.append(written[stop] if whole == ids[:stop] else joint(reference, prompt, whole)[-1])
        everything = total([each for row in logs for each in row])
        p = [math.exp(total(row) - everything) for row in logs]
        assert [each["value"] for each in field["alternatives"]] == values
        assert [each["probability"] for each in field["alternatives"]] == pytest.approx(p, abs=1e-3), name
        assert field["probability"] == pytest.approx(p[values.index(field["value"])], abs=1e-3)
        entropy = -sum(q * math.log(q) for q in p if q > 0)
        aleatoric = 0.0
        for k in range(PARTICLES):
            mine = total([row[k] for row in logs])
            shares = [math.exp(row[k] - mine) for row in logs]
            aleatoric -= math.exp(mine - everything) * sum(q * math.log(q) for q in shares if q > 0)
        expected = {"total": entropy, "aleatoric": aleatoric, "epistemic": entropy - aleatoric}
        assert field["entropy"] == pytest.approx(expected, abs=2e-3), name

    for name in ("dish", "stars"):
        field, (start, stop) = found[name], place(tokenizer, ids, text, name)
        logprob = total(written[stop]) - total(written[start])
        assert field["logprob"] == pytest.approx(logprob, abs=2e-3) and field["tokens"] == stop - start
        assert field["probability"] == pytest.approx(math.exp(logprob), abs=1e-3)
        share = [math.exp(each - total(written[start])) for each in written[start]]
        gained = [after - before for before, after in zip(written[start], written[stop], strict=True)]
        mean = sum(w * each for w, each in zip(share, gained, strict=True))
        assert field["information"] == pytest.approx(logprob - mean, abs=3e-3)


@pytest.mark.long
def test_the_numbers_are_the_same_however_the_text_is_sent(server: Running) -> None:
    """The text is cut, and has the numbers of its whole values."""
    sent = {"model": "gang", **SENT, "max_tokens": 40, "temperature": 0, "uncertainty": {"fields": True}}
    (choice,) = server.post("/v1/completions", **sent)["choices"]
    fields = choice["uncertainty"]["fields"]
    assert 0 < len(fields) <= len(SCHEMA["required"]), choice["text"]
    lines = httpx.post(
        f"{server.url}/v1/completions",
        json={**sent, "stream": True},
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=120,
    ).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    streamed = chunks[-1]["choices"][0]["uncertainty"]["fields"]
    assert [(each["path"], each["value"]) for each in streamed] == [(each["path"], each["value"]) for each in fields]
    for one, two in zip(streamed, fields, strict=True):
        assert one["probability"] == pytest.approx(two["probability"], abs=1e-3)
    mapped = server.post("/v1/completions", **{**sent, "model": "mood/map"})["choices"][0]["uncertainty"]
    assert mapped["predictive"] == "map" and all(each["entropy"]["epistemic"] == 0 for each in mapped["fields"][:1])
