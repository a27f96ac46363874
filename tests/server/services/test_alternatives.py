"""The values that a schema lists for a leaf."""

from __future__ import annotations

from typing import Any

import pytest

from server.services.alternatives import alternatives
from server.services.leaves import Path, Scalar

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad", "good"]},
        "again": {"type": "boolean", "description": "would they?"},
        "gone": {"type": "null"},
        "kind": {"const": "review"},
        "mixed": {"enum": [1, True, "1", None, 1.0]},
        "shared": {"$ref": "#/$defs/a~1%62"},
        "maybe": {"anyOf": [{"$ref": "#/$defs/mood"}, {"type": "null"}]},
        "one": {"oneOf": [{"const": 1}, {"const": 2}]},
        "wrapped": {"allOf": [{"$ref": "#/$defs/mood"}]},
        "either": {"type": ["boolean", "null"]},
        "name": {"type": "string"},
        "count": {"type": "integer"},
        "text or null": {"type": ["string", "null"]},
        "enum or text": {"anyOf": [{"enum": ["a"]}, {"type": "string"}]},
        "joint": {"allOf": [{"enum": ["a"]}, {"enum": ["a", "b"]}]},
        "objects": {"enum": [{"a": 1}, None]},
        "many": {"enum": [str(i) for i in range(256)]},
        "list": {"type": "array", "items": {"enum": ["x", "y"]}},
        "pair": {"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"enum": [0]}},
        "deep": {"anyOf": [{"type": "null"}, {"properties": {"in": {"type": "boolean"}}}]},
        "kinds": {
            "anyOf": [
                {"properties": {"kind": {"const": "a"}, "x": {"enum": [1, 2]}, "z": {"type": "boolean"}}},
                {"properties": {"kind": {"const": "b"}, "x": {"enum": [3]}, "z": {"type": "boolean"}}},
            ]
        },
        "map": {"additionalProperties": {"type": "boolean"}},
        "patterns": {"patternProperties": {"^a": {"type": "boolean"}}, "additionalProperties": {"enum": [1, 2]}},
        "lost": {"$ref": "#/$defs/nowhere"},
        "tree": {"$ref": "#/$defs/tree"},
        "circle": {"$ref": "#/$defs/circle"},
        "any": True,
    },
    "$defs": {
        "mood": {"enum": ["good", "bad"]},
        "a/b": {"type": "boolean"},
        "tree": {
            "properties": {"leaf": {"type": "boolean"}, "more": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}
        },
        "circle": {"anyOf": [{"$ref": "#/$defs/circle"}, {"const": "o"}]},
    },
}


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (("mood",), ("good", "bad")),
        (("again",), (True, False)),
        (("gone",), (None,)),
        (("kind",), ("review",)),
        (("mixed",), (1, True, "1", None)),
        (("shared",), (True, False)),
        (("maybe",), ("good", "bad", None)),
        (("one",), (1, 2)),
        (("wrapped",), ("good", "bad")),
        (("either",), (True, False, None)),
        (("list", 7), ("x", "y")),
        (("pair", 0), (True, False)),
        (("pair", 1), (0,)),
        (("deep", "in"), (True, False)),
        (("kinds", "z"), (True, False)),
        (("kinds", "kind"), ("a", "b")),
        (("kinds", "x"), (1, 2, 3)),
        (("map", "whatever"), (True, False)),
        (("tree", "more", 3, "more", 0, "leaf"), (True, False)),
        (("circle",), ("o",)),
    ],
)
def test_listed(path: Path, values: tuple[Scalar, ...]) -> None:
    found = alternatives(SCHEMA, path, {})
    assert found == values and [type(each) for each in found or ()] == [type(each) for each in values]


@pytest.mark.parametrize(
    "path",
    [
        ("name",), ("count",), ("text or null",), ("enum or text",), ("joint",), ("objects",), ("many",),
        ("objects", "a"), ("patterns", "b"), ("lost",), ("any",), ("any", "b"),
        ("unknown",), ("list", "x"), ("mood", 0), (),
    ],
)  # fmt: skip
def test_open(path: Path) -> None:
    assert alternatives(SCHEMA, path, {}) is None


@pytest.mark.parametrize(("kind", "values"), [("a", (1, 2)), ("b", (3,))])
def test_what_stands_before_a_leaf_tells_the_branch(kind: str, values: tuple[Scalar, ...]) -> None:
    assert alternatives(SCHEMA, ("kinds", "x"), {("kinds", "kind"): kind, ("mood",): "bad"}) == values
    assert alternatives(SCHEMA, ("kinds", "x"), {("kind",): kind}) == (1, 2, 3), "another object's"


@pytest.mark.parametrize("schema", [{}, True, {"properties": 3}, {"anyOf": "x"}, {"type": 7}, {"$ref": 5}, {"enum": 1}])
def test_schemas_that_say_little(schema: Any) -> None:
    assert alternatives(schema, ("a",), {}) is None and alternatives(schema, (), {}) is None


def test_a_schema_of_branches_within_branches_is_read_once() -> None:
    """2^30 ways lead to the same definition."""
    defs = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]} for i in range(30)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**defs, "d30": {"type": "boolean"}}}
    assert alternatives(schema, (), {}) == (True, False)
    step = {f"s{i}": {"properties": {"a": {"anyOf": [{"$ref": f"#/$defs/s{i + 1}"}] * 2}}} for i in range(30)}
    schema = {"$ref": "#/$defs/s0", "$defs": {**step, "s30": {"type": "boolean"}}}
    assert alternatives(schema, ("a",) * 30, {}) == (True, False)
