"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

from posterior.errors import PosteriorError, shortened

logger = logging.getLogger("posterior.server")

RETRY_SECONDS = 5


class ApiError(Exception):
    """A failure the client is told about: an HTTP status, one clear line, the field at fault, OpenAI's code."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        message = shortened(message)
        super().__init__(message)
        self.headers = dict(headers or {})
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def type(self) -> str:
        if self.status in (401, 403):
            return "authentication_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {503: {"Retry-After": str(RETRY_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status, {})
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers | headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def unavailable(message: str) -> ApiError:
    return ApiError(503, message, code="unavailable")


def internal_error() -> ApiError:
    """What the client learns of a fault of ours: nothing of its inside. The log has the rest."""
    return ApiError(500, "the server failed to answer this request; its log says why", code="internal_error")


def model_not_found(name: object) -> ApiError:
    return ApiError(
        404,
        f"the model {name!r} is not served here; GET /v1/models lists what is",
        param="model",
        code="model_not_found",
    )


def from_validation(error: ValidationError, body: Any) -> ApiError:
    """One complaint of pydantic about `body` as one line, without its types and links."""
    first = _first(error.errors(include_url=False, include_context=False, include_input=False), body)
    where = ".".join(map(str, _path(first["loc"], body, first["type"] == "missing"))) or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown field {where!r}", where)
    if first["type"] == "missing":
        return bad_request(f"the field {where!r} is required", where)
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return bad_request(f"{where or 'the body'} must be a JSON object", where)
    message = first["msg"].splitlines()[0].removeprefix("Value error, ")
    return bad_request(f"{where}: {message}" if where else message, where)


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


def as_api_error(error: Exception) -> ApiError:
    """Any exception of a request as what its client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PosteriorError):
        return bad_request(str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    logger.error("request failed", exc_info=error)
    return internal_error()


def register(app: FastAPI) -> None:
    """Answer every exception of `app` in OpenAI's format."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, PosteriorError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
