"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from posterior.errors import PosteriorError

logger = logging.getLogger("posterior.server")

RETRY_SECONDS = 5


class ApiError(Exception):
    """A failure the client is told about: an HTTP status, one clear line, the field at fault, OpenAI's code."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
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
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status == 503 else None
        if self.status == 401:
            headers = {"WWW-Authenticate": "Bearer"}
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


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


def from_validation(error: ValidationError, prefix: str = "") -> ApiError:
    """The first complaint of pydantic as one line, without its types and links."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Beyond the client's own field names pydantic adds types of the union it tried: "messages.0.SomeParam.content"
    path = takewhile(lambda part: isinstance(part, int) or (part.isidentifier() and part.islower()), first["loc"])
    where = ".".join([prefix, *map(str, path)]).strip(".") or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown field {where!r}", where)
    if first["type"] == "missing":
        return bad_request(f"the field {where!r} is required", where)
    message = first["msg"].splitlines()[0].removeprefix("Value error, ")
    return bad_request(f"{where}: {message}" if where else message, where)


def as_api_error(error: Exception) -> ApiError:
    """Any exception of a request as what its client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PosteriorError):
        return bad_request(str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    logger.error("request failed", exc_info=error)
    return internal_error()


def register(app: FastAPI) -> None:
    """Answer every exception of `app` in OpenAI's format."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, PosteriorError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
