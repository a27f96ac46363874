"""The API as OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import posterior
from server.http.errors import RETRY_SECONDS
from server.http.replies import Error
from server.http.schemas import (
    AliasRequest,
    ChatRequest,
    CompletionRequest,
    DecisionRequest,
    LoadRequest,
    Outcome,
    OutcomesRequest,
    PredictiveRequest,
    SystemOneRequest,
)

BODIES = (
    AliasRequest, ChatRequest, CompletionRequest, DecisionRequest, LoadRequest, Outcome, OutcomesRequest,
    PredictiveRequest, SystemOneRequest,
)  # fmt: skip
REFERENCE = "#/components/schemas/{model}"
MEANINGS = {
    400: "The request is not valid",
    401: "The key is missing or wrong",
    403: "The key is not that of an admin",
    404: "No such model, answer, posterior or alias",
    408: "The body did not come in time",
    409: "It contradicts what is there; the line says what to change",
    413: "The body is too large",
    429: "The key has used up what it may use a minute, or too many requests are before this one",
    503: "Not ready, busy or stopping; try again later",
}


def replies(reply: type[BaseModel] | None, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: what it answers (None: no JSON), and the statuses with which it may fail."""
    described: dict[int | str, dict[str, Any]] = {} if reply is None else {200: {"model": reply}}
    described |= {status: {"model": Error, "description": MEANINGS[status]} for status in statuses}
    for status in described.keys() & {429, 503}:
        schema = {"type": "integer", "example": RETRY_SECONDS}
        described[status]["headers"] = {"Retry-After": {"description": "Seconds to wait", "schema": schema}}
    return described


def body(*models: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads one of the `models` itself."""
    forms: list[dict[str, Any]] = [{"$ref": REFERENCE.format(model=model.__name__)} for model in models]
    schema = forms[0] if len(forms) == 1 else {"anyOf": forms}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, *, key: bool, public: frozenset[str]) -> dict[str, Any]:
    """The OpenAPI document of the routes of `app`; `key`: all but those at `public` need one."""
    document = get_openapi(
        title="Posterior Server",
        version=posterior.__version__,
        description="OpenAI's API with a posterior predictive distribution on every answer. Entropies are in nats.",
        routes=app.routes,
    )
    _, bodies = models_json_schema([(model, "validation") for model in BODIES], ref_template=REFERENCE)
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(bodies["$defs"])
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        operation["responses"].pop("422", None)  # FastAPI's own form of a bad request, which is never sent
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    if key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        for path in public & document["paths"].keys():
            for operation in document["paths"][path].values():
                operation["security"] = []
    return document


async def show(request: Request) -> Response:
    """GET /openapi.json"""
    document, prefix = request.app.state.description(), request.scope.get("root_path")
    return JSONResponse({**document, "servers": [{"url": prefix}]} if prefix else document)
