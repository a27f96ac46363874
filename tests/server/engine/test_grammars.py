"""Grammars that may take minutes to compile are refused before vLLM sees them; ordinary ones pass."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.grammars import check_grammars
from server.errors import Refused

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 100},
        "kind": {"enum": ["a", "b"]},
        "next": {"$ref": "#/$defs/n"},
    },
    "$defs": {"n": {"type": "array", "items": {"type": "integer"}, "maxItems": 20}},
}
PASS = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"choice": [str(i) for i in range(256)]}},
    {"structured_outputs": {"regex": r"[a-z]{1,64}@[a-z]+\.com"}},
    {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 40_000, "parameters": SCHEMA}}]},
    {"prompt": "x" * 100_000},
    {"response_format": None},
]
REFUSED = [
    {"structured_outputs": {"json": {"type": "string", "minLength": 10**9}}},
    {"structured_outputs": {"json": '{"type": "array", "maxItems": 100000000}'}},
    {"structured_outputs": {"json": "{"}},
    {"structured_outputs": {"json": {"$ref": "#"}}},
    {"structured_outputs": {"json": {"$ref": "http://example.org/schema"}}},
    {"structured_outputs": {"choice": [str(i) for i in range(257)]}},
    {"structured_outputs": {"choice": ["x" * 40_000, "y"]}},
    {"structured_outputs": {"regex": "a{1,100000}"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"anyOf": [{"pattern": "(ab){5000}"}]}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": list(range(300))}}}},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"maxProperties": 10**6}}}]},
]


@pytest.mark.parametrize("body", PASS, ids=range(len(PASS)))
def test_ordinary_grammars_pass(body: dict[str, Any]) -> None:
    check_grammars(body)


@pytest.mark.parametrize("body", REFUSED, ids=range(len(REFUSED)))
def test_grammars_without_bound_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(Refused) as caught:
        check_grammars(body)
    assert caught.value.param == next(iter(body)) and len(caught.value.message) < 200


def test_a_schema_that_is_very_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(60):
        schema = {"properties": {"x": schema}}
    with pytest.raises(Refused, match="nested deeper"):
        check_grammars({"structured_outputs": {"json": schema}})
