"""Text that is JSON: the schema that a request gives it, and what is known of each of its values."""

from __future__ import annotations

import json
from typing import Any

from server.errors import Refused
from server.http.records import field_record
from server.http.schemas import ChatRequest, CompletionRequest
from server.services.fields import fields
from server.services.options import TextUncertainty
from server.services.texts import Writer


def form(request: ChatRequest | CompletionRequest, options: TextUncertainty) -> Any:
    """The JSON schema of a request's text, {} for any JSON; None if nobody asks for its fields.

    Raises Refused where fields are asked for and there is none.
    """
    if not options.fields:
        return None
    if options.samples is not None:
        raise Refused("'samples' take no grammar, and 'fields' need one: ask for one of them", "uncertainty.fields")
    if getattr(request, "tools", None) and getattr(request, "tool_choice", None) != "none":
        raise Refused("'fields' describe a reply in JSON, not calls of tools: leave 'tools' out", "tools")
    found = _schema(request.response_format or {}, request.structured_outputs or {})
    if found is None:
        raise Refused(
            "'fields' need text that a grammar holds to JSON: give 'response_format' as {\"type\": \"json_schema\", "
            '"json_schema": {"name": ..., "schema": ...}} or as {"type": "json_object"}',
            "uncertainty.fields",
        )
    return found


def _schema(response_format: dict[str, Any], structured_outputs: dict[str, Any]) -> Any:
    """The schema, as vLLM reads the two: the first has the last word. None if they give none."""
    kind = response_format.get("type", "text")
    if kind == "json_schema":
        described = response_format.get("json_schema")
        return described.get("schema") if isinstance(described, dict) else None
    if kind == "json_object" or (kind == "text" and structured_outputs.get("json_object")):
        return {}
    given = structured_outputs.get("json") if kind == "text" else None
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError):
        raise Refused("structured_outputs.json is no JSON", "structured_outputs") from None


async def attach_fields(choice: dict[str, Any], writer: Writer) -> None:
    """Puts the fields of a finished choice, if they are asked for, into its uncertainty."""
    if writer.form is not None and writer.trace is not None:
        found = await fields(writer, writer.trace, choice["index"])
        choice["uncertainty"]["fields"] = [field_record(each) for each in found]
