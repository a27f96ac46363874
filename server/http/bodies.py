"""Bodies of requests, read before anything is done for them."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request
from pydantic_core import from_json

from posterior.data.reading import unique
from posterior.errors import first_line
from server.errors import Refused
from server.http.errors import ApiError
from server.http.schemas import MAX_BODY_BYTES


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object of at most MAX_BODY_BYTES.

    Raises Refused, and ApiError 413.
    """
    chunks = bytearray()
    async for chunk in request.stream():
        chunks += chunk
        if len(chunks) > MAX_BODY_BYTES:
            raise ApiError(
                413,
                f"the body is larger than {MAX_BODY_BYTES} bytes; send fewer prompts a request",
                code="body_too_large",
            )
    try:
        from_json(bytes(chunks), allow_inf_nan=False)  # stricter than Python's reader, which takes half of a character
        body = json.loads(chunks, object_pairs_hook=unique)
        json.dumps(body, allow_nan=False)  # 1e999 is a number to the reader, and infinite
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not valid JSON in UTF-8: {first_line(error)}") from error
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    return body
