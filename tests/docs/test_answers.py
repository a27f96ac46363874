"""docs/answers.md and docs/text.md have a row for every field that requests take and that replies have."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from posterior.calibration.records import Record
from server.http import predictive, records, replies
from server.http.schemas import PredictiveRequest
from server.services.options import MAX_INTEGER, TextUncertainty, Uncertainty
from tests.docs.blocks import ROOT

LIMITS = ("minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# What the page describes: the models of replies, and the code that writes them.
CHOICES = (replies.PredictiveReply, replies.PredictiveItem, replies.Candidate, replies.Entropy, replies.Variance)
CHOICE_WRITERS = (
    predictive._choices,
    predictive._reply,
    records.answer_record,
    records._choice,
    records._candidates,
    records.usage_record,
    Record.summary,
)
TEXTS = (
    replies.TextRecord,
    replies.TextItem,
    replies.SemanticRecord,
    replies.Meaning,
    replies.OtherMeanings,
    replies.FieldRecord,
    replies.ValueProbability,
)
TEXT_WRITERS = (
    predictive._texts,
    records.text_record,
    records.right_record,
    records.semantic_record,
    records.field_record,
    records._probable,
    records._summary,
    records._tokens,
)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def tables(text: str, first: str) -> list[list[list[str]]]:
    """The rows, in cells, of every table whose header begins with the cell `first`."""
    found = []
    for block in re.findall(r"(?m)(?:^\|.*\n)+", text):
        header, _, *rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()
        ]
        if header[0] == first:
            found.append(rows)
    return found


def requests() -> list[dict[str, list[str]]]:
    """The two tables of request fields: cells by field."""
    asked = page("answers.md").partition("## Fields of a reply")[0]
    return [{row[0].strip("`"): row for row in rows} for rows in tables(asked, "Field")]


def limits(schema: Any) -> Iterator[float]:
    """The bounds in a field's JSON schema."""
    if isinstance(schema, dict):
        yield from (value for key, value in schema.items() if key in LIMITS)
        schema = list(schema.values())
    if isinstance(schema, list):
        for each in schema:
            yield from limits(each)


def test_every_field_of_a_request_has_a_row() -> None:
    own, shared = requests()
    assert shared.keys() == Uncertainty.model_fields.keys()
    assert own.keys() == PredictiveRequest.model_fields.keys() - Uncertainty.model_fields.keys()


def test_every_field_of_a_text_has_a_row() -> None:
    (rows,) = tables(page("text.md"), "In `uncertainty`")
    own = {
        field.alias or name for name, field in TextUncertainty.model_fields.items()
    } - Uncertainty.model_fields.keys()
    assert own < {row[0].strip("`") for row in rows}


@pytest.mark.parametrize("model", [PredictiveRequest, Uncertainty])
def test_rows_have_the_defaults_and_the_limits_of_the_code(model: type[BaseModel]) -> None:
    own, shared = requests()
    schemas = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        _, _, default, _, allowed = (own | shared)[name]
        assert (default == "required") == field.is_required(), name
        if not field.is_required() and field.default is not None:
            assert default == f"`{json.dumps(field.default)}`", name
        for number in limits(schemas[name]):
            assert number == MAX_INTEGER or re.search(rf"(?<![\d.]){number:g}(?![\d.]*\d)", allowed), (name, number)


def written(source: str) -> set[str]:
    """The names that code writes into JSON: constant keys of dictionaries, and constant subscripts that are set."""
    keys: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Dict):
            keys += node.keys
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys.append(node.slice)
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


@pytest.mark.parametrize(
    ("name", "models", "writers"),
    [("answers.md", CHOICES, CHOICE_WRITERS), ("text.md", TEXTS, TEXT_WRITERS)],
)
def test_every_field_of_a_reply_has_a_row(name: str, models: Sequence[type[BaseModel]], writers: Sequence[Any]) -> None:
    text = page(name)
    cells = [row[0] for rows in tables(text[text.rindex("## Fields of a ") :], "Field") for row in rows]
    rows = {part for cell in cells for span in re.findall("`([^`]+)`", cell) for part in re.split(r"\[\]\.|\.", span)}
    fields = {field for model in models for field in model.model_fields}
    fields = fields.union(*(written(inspect.getsource(writer)) for writer in writers))
    assert fields <= rows, fields - rows
