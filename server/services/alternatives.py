"""What a JSON schema lets a leaf be, where that is a list of values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from posterior.data.candidates import MAX_CANDIDATES
from server.services.leaves import Path, Scalar

OPEN: dict[str, Any] = {}  # the schema that anything follows


def alternatives(schema: Any, path: Path, known: Mapping[Path, Scalar]) -> tuple[Scalar, ...] | None:
    """The values of the leaf at this path, in the schema's order: of an enum, a const, a boolean or null, or of an
    `anyOf` of these. None for any other leaf.

    known: the leaves that stand before it. An object with one of them that a branch of an `anyOf` does not list is not
    of this branch.
    """
    here: list[Any] = [schema]
    for depth, part in enumerate(path):
        branches = [branch for each in here for branch in _branches(schema, each)]
        if len(branches) > 1:
            branches = [branch for branch in branches if _fits(branch, path[:depth], known)]
        children = [child for branch in branches for child in _children(branch, part)]
        here = list({id(child): child for child in children}.values())
    found = [_values(schema, each) for each in here]
    values: list[Any] = []
    for value in (value for each in found for value in each or ()):
        if not any(same(value, other) for other in values):
            values.append(value)
    listed = None not in found and all(isinstance(value, Scalar) for value in values)
    return tuple(values) if listed and 0 < len(values) <= MAX_CANDIDATES else None


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same in JSON: true is not 1."""
    return bool(isinstance(one, bool) == isinstance(other, bool) and one == other)


def _fits(branch: dict[str, Any], path: Path, known: Mapping[Path, Scalar]) -> bool:
    """Whether the object at this path may be of this branch, by the properties with a const or an enum."""
    properties = branch.get("properties")
    for name, each in properties.items() if isinstance(properties, dict) else ():
        listed = _listed(each) if (*path, name) in known else None
        if listed is not None and not any(same(known[*path, name], value) for value in listed):
            return False
    return True


def _listed(schema: Any) -> list[Any] | None:
    """The values of a const or an enum."""
    if not isinstance(schema, dict):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else None


def _values(root: Any, schema: Any) -> list[Any] | None:
    """All values of a leaf's schema; None where they are not listed."""
    found: list[Any] = []
    for branch in _branches(root, schema):
        if (listed := _listed(branch)) is not None:
            found += listed
        elif branch.get("type") == "boolean":
            found += [True, False]
        elif branch.get("type") == "null":
            found.append(None)
        else:
            return None
    return found


def _branches(root: Any, schema: Any) -> Iterator[dict[str, Any]]:
    """The schemas, without references and alternatives of schemas, of which a value follows one; each once."""
    seen: set[int] = set()  # a schema may refer to itself
    waiting = [schema]
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        if not isinstance(each, dict):
            yield OPEN
        elif "$ref" in each:
            waiting.insert(0, _referred(root, each["$ref"]))
        elif "const" in each or "enum" in each:
            yield each
        elif isinstance(several := each.get("anyOf", each.get("oneOf")), list):
            waiting[:0] = several
        elif isinstance(joint := each.get("allOf"), list):
            waiting.insert(0, joint[0] if len(joint) == 1 else OPEN)
        elif isinstance(kinds := each.get("type"), list):
            yield from ({**each, "type": kind} for kind in kinds)
        else:
            yield each


def _referred(root: Any, reference: Any) -> Any:
    """The definition that a `$ref` names, like "#/$defs/mood"."""
    found = root
    for part in str(reference).split("/")[1:]:
        found = found.get(unquote(part).replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found


def _children(schema: dict[str, Any], part: str | int) -> Iterator[Any]:
    """The schemas of what stands under this key or number, if anything may."""
    kind = schema.get("type")
    if isinstance(part, str) and kind in (None, "object"):
        properties, others = schema.get("properties"), schema.get("additionalProperties")
        if isinstance(properties, dict) and part in properties:
            yield properties[part]
        elif not isinstance(properties, dict) or others or "patternProperties" in schema:
            yield others if isinstance(others, dict) and "patternProperties" not in schema else OPEN
    elif isinstance(part, int) and kind in (None, "array"):
        first, items = schema.get("prefixItems"), schema.get("items")
        if isinstance(first, list) and part < len(first):
            yield first[part]
        else:
            yield items if isinstance(items, dict) else OPEN
