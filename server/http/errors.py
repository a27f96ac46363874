"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}, and their status codes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException

from posterior.errors import PosteriorError, shortened
from server.errors import Absent, Busy, Conflict, Fault, NotFound, Refused, RequestError, Unavailable

logger = logging.getLogger("posterior.server")

RETRY_SECONDS = 5
KINDS: Mapping[type[RequestError], tuple[int, str | None]] = {  # status and OpenAI's code of each
    Refused: (400, None),
    NotFound: (404, "model_not_found"),
    Absent: (404, "not_found"),
    Conflict: (409, "conflict"),
    Fault: (500, "internal_error"),
    Unavailable: (503, "unavailable"),
    Busy: (429, "too_many_requests"),
}


class ApiError(Exception):
    """A failure as HTTP has it: a status, one clear line, the field at fault, OpenAI's code."""

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
        """OpenAI's kind of error."""
        if self.status in (401, 403):
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer; a 429 and a 503 say when to try again, a 401 how to show a key."""
        again = {"Retry-After": str(RETRY_SECONDS)}
        headers = {429: again, 503: again, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status, {})
        return JSONResponse(self.body(), status_code=self.status, headers=headers | self.headers)


def as_api_error(error: Exception) -> ApiError:
    """Any exception of a request as the error that its client gets. One that we did not foresee goes to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        status, code = next(KINDS[kind] for kind in type(error).__mro__ if kind in KINDS)
        return ApiError(status, error.message, param=error.param, code=code)
    if isinstance(error, PosteriorError):
        return as_api_error(Refused(str(error)))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    logger.error("request failed", exc_info=error)
    return as_api_error(Fault())


def register(app: Starlette) -> None:
    """Answer every exception of `app` in OpenAI's format."""

    async def handle(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in (ApiError, RequestError, PosteriorError, HTTPException, Exception):
        app.add_exception_handler(kind, handle)
