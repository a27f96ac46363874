"""Bounds on grammars. vLLM compiles them one after the other, in threads that nothing can stop: one that takes minutes
would hold up the structured output of every client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from server.errors import Refused

MAX_CHOICES = 256
MAX_COUNT = 1024  # of a repetition: characters, items, properties, or what a regular expression repeats
MAX_DEPTH = 32
COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
REPEATS = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
FIELDS = {"structured_outputs": 2**15, "response_format": 2**15, "tools": 2**18}  # with their most characters


def check_grammars(body: dict[str, Any]) -> None:
    """Raises Refused for a grammar that may take very long to compile, or refers to another document."""
    for name, characters in FIELDS.items():
        given = body.get(name)
        if not given:
            continue
        if len(json.dumps(given)) > characters:
            raise Refused(f"{name} has more than {characters} characters; make it smaller", name)
        for key, value, depth in _walk(given):
            _check(name, key, value)
            if depth > MAX_DEPTH:
                raise Refused(f"{name} is nested deeper than {MAX_DEPTH}; make it flatter", name)


def _check(name: str, key: str, value: Any) -> None:
    if isinstance(value, list) and key in ("choice", "enum") and len(value) > MAX_CHOICES:
        raise Refused(f"{name}: {key!r} has {len(value)} entries; at most {MAX_CHOICES} are served", name)
    if key in COUNTS and isinstance(value, int | float) and value > MAX_COUNT:
        raise Refused(f"{name}: {key!r} is {value}; at most {MAX_COUNT} is served", name)
    if key == "$ref" and isinstance(value, str) and (value == "#" or not value.startswith("#")):
        raise Refused(f"{name}: '$ref' {value!r:.80} must name a definition within the schema: #/$defs/...", name)
    if isinstance(value, str) and key in ("regex", "pattern", "grammar", "format", "structural_tag"):
        counts = [int(digits) for found in REPEATS.findall(value) for digits in found if digits]
        if any(count > MAX_COUNT for count in counts):
            raise Refused(f"{name}: {key!r} repeats {max(counts)} times; at most {MAX_COUNT} are served", name)


def _walk(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any, int]]:
    """Every value within, with its key and its depth; a text that holds JSON (`structured_outputs.json`) is opened."""
    yield key, value, depth
    if key == "json" and isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Refused("structured_outputs.json is no JSON", "structured_outputs") from None
    if depth <= MAX_DEPTH and isinstance(value, dict):
        for name, each in value.items():
            yield from _walk(each, name, depth + 1)
    elif depth <= MAX_DEPTH and isinstance(value, list):
        for each in value:
            yield from _walk(each, key if isinstance(each, str) and key == "pattern" else "", depth + 1)
