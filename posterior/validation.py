"""Pydantic's complaints as one line of ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from posterior.errors import first_line


def complaint(error: ValidationError, body: Any) -> tuple[str | None, str]:
    """(where, what) of the first of the complaints about `body`: a path such as "messages.0.content", None for all of
    it, and one line that names it, without pydantic's types and links."""
    first = _first(error.errors(include_url=False, include_context=False, include_input=False), body)
    where = ".".join(map(str, _path(first["loc"], body, first["type"] == "missing"))) or None
    if first["type"] == "extra_forbidden":
        return where, f"unknown field {where!r}"
    if first["type"] == "missing":
        return where, f"the field {where!r} is required"
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return where, f"{where or 'the body'} must be a JSON object"
    message = first_line(first["msg"]).removeprefix("Value error, ")
    return where, f"{where}: {message}" if where else message


def _first(complaints: Sequence[ErrorDetails], body: Any) -> ErrorDetails:
    """The first complaint about the form that fits best, of those that pydantic tried where there is a union: one whose
    constants (a message's role) are there, with the fewest complaints, and of these the one that was read furthest."""
    forms: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for each in complaints:
        path = list(_path(each["loc"], body, each["type"] == "missing"))
        form = tuple(part for part in each["loc"] if part not in path)
        forms.setdefault(form, []).append(each)

    def misfit(found: Sequence[ErrorDetails]) -> tuple[bool, int, int]:
        other = any(each["type"] == "literal_error" for each in found)
        return other, len(found), -len(list(_path(found[0]["loc"], body, True)))

    return min(forms.values(), key=misfit)[0]


def _path(location: Sequence[str | int], body: Any, missing: bool) -> Iterator[str | int]:
    """The part of pydantic's `location` that names a place in `body`, or the field that is `missing` from it. Where it
    tried a union, pydantic puts the types that it tried between: "messages.0.SomeParam.content"."""
    for part in location:
        if isinstance(body, dict) and isinstance(part, str) and (part in body or (missing and part == location[-1])):
            body = body.get(part)
            yield part
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
            yield part
