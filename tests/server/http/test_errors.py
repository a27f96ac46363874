"""Each kind of error has its status code, OpenAI's type and code, and its headers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from posterior.errors import PosteriorError
from server.errors import EngineLost, Fault, NotFound, Refused, RequestError, Unavailable
from server.http.errors import KINDS, ApiError, as_api_error


@pytest.mark.parametrize(
    ("error", "status", "type_", "param", "code", "headers"),
    [
        (Refused("n is 0", "n"), 400, "invalid_request_error", "n", None, {}),
        (PosteriorError("no such field"), 400, "invalid_request_error", None, None, {}),
        (ApiError(401, "no key", code="invalid_api_key"), 401, "authentication_error", None, "invalid_api_key",
         {"www-authenticate": "Bearer"}),
        (NotFound("x"), 404, "invalid_request_error", "model", "model_not_found", {}),
        (Fault(), 500, "server_error", None, "internal_error", {}),
        (KeyError("a secret"), 500, "server_error", None, "internal_error", {}),
        (Unavailable("busy"), 503, "server_error", None, "unavailable", {"retry-after": "5"}),
        (EngineLost(), 503, "server_error", None, "unavailable", {"retry-after": "5"}),
    ],
)  # fmt: skip
def test_the_answer_of_each_kind(
    error: Exception, status: int, type_: str, param: str | None, code: str | None, headers: dict[str, str]
) -> None:
    response = as_api_error(error).response()
    said: dict[str, Any] = json.loads(bytes(response.body))["error"]
    assert response.status_code == status and (said["type"], said["param"], said["code"]) == (type_, param, code)
    assert "a secret" not in said["message"]
    others = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
    assert others == headers


def test_every_kind_has_a_status() -> None:
    kinds = set(RequestError.__subclasses__())
    assert kinds <= set(KINDS) and all(issubclass(kind, RequestError) for kind in KINDS)
