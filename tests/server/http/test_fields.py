"""How probable each value of a structured text is, over a fake engine whose tokens are bytes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from server.services import fields
from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.fakes import Draft
from tests.server.http.test_answers import MESSAGES, events

WEIGHTS, NUMBERS = (0.5, 0.3, 0.2), (11, 12, 13)  # of the posterior "gang": its particles' weights and adapters
SCHEMA = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad", "mixed"]},
        "again": {"type": "boolean"},
        "guest": {"type": "string"},
        "stars": {"type": "integer"},
        "level": {"enum": [1, 12, None]},
        "kind": {"const": "review"},
    },
}
TEXT = '{"mood": "bad", "again": false,\n "guest": "Zo\\u00eb é", "stars": 4, "level": 1 , "kind": "review"}'
FORM = {"type": "json_schema", "json_schema": {"name": "review", "schema": SCHEMA}}
END = 256  # the fake tokenizer's special token


def draft(text: str = TEXT, finish: str = "stop") -> Draft:
    """A text, byte by byte, then its end."""
    tokens = [*text.encode(), *([END] if finish == "stop" else [])]
    log_p = -torch.rand(len(tokens), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Draft(text, log_p.tolist(), finish, tokens)


@pytest.fixture(autouse=True)
def written(engine: fakes.Engine) -> Draft:
    """What the engine writes."""
    engine.max_model_len = 1000
    engine.drafts = [draft()]
    return engine.drafts[0]


def ask(client: TestClient, **body: Any) -> Any:
    options = {"fields": True, **body.pop("uncertainty", {})}
    whole = {"model": "gang", "prompt": "x", "response_format": FORM, "uncertainty": options, **body}
    return client.post("/v1/completions", json=whole)


def chat(client: TestClient, **body: Any) -> Any:
    whole = {"model": "gang", "messages": MESSAGES, "response_format": FORM, "uncertainty": {"fields": True}, **body}
    return client.post("/v1/chat/completions", json=whole)


def record(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0]["uncertainty"])


def found(response: Any) -> dict[str, dict[str, Any]]:
    """The fields by their paths."""
    return {field["path"]: field for field in record(response)["fields"]}


def weights_before(written: Draft, byte: int) -> list[float]:
    """w_k prod p_k of the tokens before, by a loop; not normalised."""
    return [w * math.exp(sum(row[k] for row in written.log_p[:byte])) for k, w in enumerate(WEIGHTS)]


def byte_of(part: str) -> int:
    """Where a part of the text begins, in bytes."""
    return len(TEXT[: TEXT.index(part)].encode())


# What is said


@pytest.mark.parametrize(
    ("path", "values", "begins", "candidates"),
    [
        ("/mood", ["good", "bad", "mixed"], 'bad"', ['good"', 'bad"', 'mixed"']),
        ("/again", [True, False], "false", ["true", "false"]),
        ("/level", [1, 12, None], "1 ,", ["1 ", "12 ", "null "]),
    ],
)
def test_values_that_the_schema_lists_are_scored_in_their_place(
    client: TestClient, engine: fakes.Engine, written: Draft, path: str, values: Any, begins: str, candidates: Any
) -> None:
    """The probability is that of the mixture, cut to the values: by loops over the fake engine's own numbers."""
    field = found(ask(client, uncertainty={"coverage": 0.5}))[path]
    start = byte_of(begins)
    assert [ord("x"), *TEXT.encode()[:start]] in engine.contexts
    logits = [fakes.particle_logits(number, len(values)).tolist() for number in NUMBERS]
    joint = [
        [w * math.exp(x * len(text)) for x, text in zip(row, candidates, strict=True)]
        for w, row in zip(weights_before(written, start), logits, strict=True)
    ]
    everything = sum(map(sum, joint))
    p = [sum(row[c] for row in joint) / everything for c in range(len(values))]
    assert [each["value"] for each in field["alternatives"]] == values
    assert [each["probability"] for each in field["alternatives"]] == pytest.approx(p)
    own = next(i for i, value in enumerate(values) if value == field["value"])
    mine = field["alternatives"][own]
    assert {name: field[name] for name in mine} == mine
    assert (field["certainty"], field["logprob"]) == (pytest.approx(p[own]), pytest.approx(math.log(p[own])))
    given = [sum(row) / everything for row in joint]
    total = -sum(each * math.log(each) for each in p)
    parts = [-sum(q / sum(row) * math.log(q / sum(row)) for q in row) for row in joint]
    aleatoric = sum(g * each for g, each in zip(given, parts, strict=True))
    expected = {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}
    assert field["entropy"] == pytest.approx(expected)
    assert field["effective_particles"] == pytest.approx(1 / sum(g * g for g in given))
    shares = sorted(zip([row[own] / sum(row) for row in joint], given, strict=True))
    lower = next(q for i, (q, _) in enumerate(shares) if sum(g for _, g in shares[: i + 1]) >= 0.25)
    assert mine["interval"][0] == pytest.approx(lower)
    spread = sum(g * (q - p[own]) ** 2 for q, g in shares) / (1 - sum(g * g for g in given))
    assert mine["variance"] == pytest.approx(spread)


@pytest.mark.parametrize(
    ("path", "value", "begins", "spelling"),
    [("/guest", "Zoë é", 'Zo\\u00eb é"', 'Zo\\u00eb é"'), ("/stars", 4, "4, ", "4,")],
)
def test_other_values_have_the_probability_of_their_tokens(
    client: TestClient, written: Draft, path: str, value: Any, begins: str, spelling: str
) -> None:
    """A string ends with its quote, a number with what follows it."""
    field = found(ask(client))[path]
    start, size = byte_of(begins), len(spelling.encode())
    assert (field["value"], field["tokens"]) == (value, size) and "alternatives" not in field
    before = weights_before(written, start)
    share = [w / sum(before) for w in before]
    each = [sum(row[k] for row in written.log_p[start : start + size]) for k in range(3)]
    p = sum(w * math.exp(x) for w, x in zip(share, each, strict=True))
    assert (field["probability"], field["logprob"]) == (pytest.approx(p), pytest.approx(math.log(p)))
    assert field["certainty"] == pytest.approx(p ** (1 / size))
    expected = sum(w * x for w, x in zip(share, each, strict=True))
    assert (field["expected_logprob"], field["information"]) == (
        pytest.approx(expected),
        pytest.approx(math.log(p) - expected),
    )
    assert field["entropy"] == pytest.approx({"total": size, "aleatoric": 0.75 * size, "epistemic": 0.25 * size})
    spread = sum(w * (math.exp(x) - p) ** 2 for w, x in zip(share, each, strict=True))
    assert field["variance"] == pytest.approx(spread / (1 - sum(w * w for w in share)))


def test_a_value_that_the_schema_leaves_no_choice_of_is_certain(client: TestClient, engine: fakes.Engine) -> None:
    field = found(ask(client))["/kind"]
    assert (field["probability"], field["entropy"]["total"], field["interval"]) == (1.0, 0.0, [1.0, 1.0])
    assert [each["value"] for each in field["alternatives"]] == ["review"] and len(engine.scored) == 3


def test_the_record_keeps_what_a_text_has(client: TestClient) -> None:
    with_fields = record(ask(client, uncertainty={"tokens": True}))
    paths = [field["path"] for field in with_fields.pop("fields")]
    assert paths == ["/mood", "/again", "/guest", "/stars", "/level", "/kind"]
    assert with_fields == record(ask(client, uncertainty={"tokens": True, "fields": False}))
    assert "fields" not in record(ask(client, uncertainty={"fields": None}))


@pytest.mark.parametrize("send", [ask, chat])
def test_a_stream_says_the_same_on_its_last_chunk(client: TestClient, send: Any) -> None:
    whole = record(send(client))
    chunks = events(send(client, stream=True))
    records = [chunk["choices"][0].get("uncertainty", {}) for chunk in chunks]
    assert ["fields" in each for each in records] == [False] * (len(chunks) - 1) + [True]
    assert records[-1]["fields"] == whole["fields"]


def test_choices_and_prompts_have_their_own_fields(client: TestClient, engine: fakes.Engine) -> None:
    engine.drafts = [draft(), draft('{"mood": "good"}')]
    choices = ask(client, prompt=["x", "y"], n=2).json()["choices"]
    each = [[field["value"] for field in choice["uncertainty"]["fields"]] for choice in choices]
    assert each[1] == each[3] == ["good"] and each[0] == each[2] and each[0][0] == "bad"
    assert [ord("y"), *b'{"mood": "'] in engine.contexts and [ord("x"), *b'{"mood": "'] in engine.contexts


def test_one_adapter_has_fields_without_an_epistemic_part(client: TestClient) -> None:
    for body in ({"model": "gang/map"}, {"uncertainty": {"predictive": "map"}}, {"uncertainty": {"particles": 1}}):
        fields = found(ask(client, **body))
        assert fields["/mood"]["entropy"]["epistemic"] == 0 and fields["/mood"]["variance"] == 0
        assert fields["/guest"]["information"] == 0 and fields["/guest"]["probability"] < 1


@pytest.mark.parametrize(
    ("form", "alternatives"),
    [
        ({"response_format": {"type": "json_object"}}, False),
        ({"response_format": None, "structured_outputs": {"json": SCHEMA}}, True),
        ({"response_format": {"type": "text"}, "structured_outputs": {"json": json.dumps(SCHEMA)}}, True),
        ({"structured_outputs": {"json": {"type": "object"}}}, True),
        ({"response_format": None, "structured_outputs": {"json_object": True}}, False),
    ],
)
def test_every_way_to_ask_for_json(client: TestClient, form: dict[str, Any], alternatives: bool) -> None:
    fields = found(ask(client, **form))
    assert ("alternatives" in fields["/mood"]) == alternatives
    assert len(fields) == 6 and 0 < fields["/mood"]["probability"] < 1


def test_of_a_text_that_was_cut_the_whole_values_are_listed(client: TestClient, engine: fakes.Engine) -> None:
    for end, paths in (('"stars"', ["/mood", "/again", "/guest"]), (', "level', ["/mood", "/again", "/guest"])):
        engine.drafts = [draft(TEXT[: TEXT.index(end)], "length")]
        assert list(found(ask(client))) == paths, "the number may go on"
    engine.drafts = [draft("12")]
    (field,) = record(ask(client, response_format={"type": "json_object"}))["fields"]
    assert (field["path"], field["value"], field["tokens"]) == ("", 12, 3), "here it may not"
    engine.drafts = [draft("", "length")]
    assert record(ask(client))["fields"] == []


def test_numbers_at_the_end_of_a_text_are_scored_with_the_token_that_ends_it(
    client: TestClient, engine: fakes.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    score = engine.score

    async def watched(prompts: Any, candidates: Any, adapters: Any) -> Any:
        seen.append(candidates)
        return await score(prompts, candidates, adapters)

    monkeypatch.setattr(engine, "score", watched)
    engine.drafts = [draft("1")]
    ask(client, structured_outputs={"json": {"enum": [1, 12]}}, response_format=None)
    assert seen == [((ord("1"), END), (ord("1"), ord("2"), END))]


def test_a_value_that_the_schema_does_not_list_is_like_any_other(client: TestClient, engine: fakes.Engine) -> None:
    engine.drafts = [draft('{"mood": "awful", "again": 1}')]
    fields = found(ask(client))
    assert engine.scored == [] and not any("alternatives" in field for field in fields.values())


# What is refused, and what is left out


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": None}, "uncertainty.fields", '\'response_format\' as {"type": "json_schema"'),
        ({"response_format": {"type": "text"}}, "uncertainty.fields", "need text that a grammar holds to JSON"),
        ({"response_format": None, "structured_outputs": {"regex": "a"}}, "uncertainty.fields", "to JSON"),
        ({"response_format": {"type": "structural_tag"}}, "uncertainty.fields", "to JSON"),
        ({"response_format": {"type": "json_schema"}}, "uncertainty.fields", "to JSON"),
        ({"response_format": None, "structured_outputs": {"json": "{"}}, "structured_outputs", "is no JSON"),
        ({"uncertainty": {"samples": 3}}, "uncertainty.fields", "ask for one of them"),
        ({"uncertainty": {"mixing": "token"}}, "uncertainty.mixing", "'sequence' mixing"),
        ({"uncertainty": {"answers": ["a", "b"]}}, "uncertainty", "belong to text"),
        ({"uncertainty": {"fields": "yes"}}, "uncertainty.fields", "boolean"),
        ({"model": "tiny-base"}, "uncertainty.fields", "the base alone"),
    ],
)
def test_refusals(client: TestClient, engine: fakes.Engine, body: dict[str, Any], param: str, words: str) -> None:
    error = error_of(ask(client, **body), 400)
    assert words in error["message"] and error["param"] == param, error
    assert engine.bodies == []


def test_tools_are_refused(client: TestClient) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert error_of(chat(client, tools=tools), 400)["param"] == "tools"
    assert chat(client, tools=tools, tool_choice="none").status_code == 200


def test_values_beyond_the_limit_of_reads_are_not_scored(
    client: TestClient, engine: fakes.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is shared by the texts of a request; a value that would pass it has its tokens' probability."""
    mood = 5 + 4 + 6 - 2  # different beginnings of the values, byte by byte, less the shared empty one
    monkeypatch.setattr(fields, "MAX_SEQUENCES", 2 * 3 * mood)
    first, _ = ask(client, n=2).json()["choices"]
    found = {field["path"]: field for field in first["uncertainty"]["fields"]}
    assert found["/mood"]["alternatives"] and engine.scored == [(1, 3)] * 2
    assert found["/again"]["alternatives"] is None and found["/again"]["information"] > 0
    assert found["/kind"]["alternatives"], "nothing is read for it"


def test_values_beyond_the_context_are_not_scored(client: TestClient, engine: fakes.Engine) -> None:
    engine.max_model_len = 1 + byte_of('bad"') + len('mixed"')
    assert found(ask(client))["/mood"]["alternatives"]
    engine.max_model_len -= 1
    assert found(ask(client))["/mood"]["alternatives"] is None


def test_an_engine_that_fails_while_values_are_scored(
    client: TestClient, engine: fakes.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(engine, "score", broken)
    assert "secret" not in error_of(ask(client), 500)["message"]
    text = ask(client, stream=True).text
    assert '"type": "server_error"' in text and "secret" not in text and "fields" not in text
