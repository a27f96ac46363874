"""The HTTP application: exactly the routes below, and nothing of vLLM's."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

import posterior
from server import answers, errors
from server.answers import Reply
from server.auth import require_key
from server.errors import ApiError, as_api_error, bad_request, unavailable
from server.metrics import Observation
from server.predictive import Service
from server.registry import Registry
from server.schemas import MAX_BODY_BYTES

T = TypeVar("T")
Handler = Callable[[dict[str, Any], Request, Observation], Awaitable[Reply]]

CLIENT_LEFT = 499  # nginx's number for a client that closed the connection


def create_app(service: Service, key: str | None) -> FastAPI:
    """The application over a running service. `app.state.ready` is False until its owner has warmed it up."""
    app = FastAPI(
        title="Posterior Server",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        dependencies=[Depends(require_key(key))],
    )
    app.state.service = service
    app.state.ready = False
    errors.register(app)
    app.add_route("/health", _health)  # a plain route: the one that the key's dependency does not cover
    app.get("/ready")(_ready)
    app.get("/version")(_version)
    app.get("/metrics")(_metrics)
    app.get("/v1/models")(_models)
    app.get("/v1/models/{name:path}")(_model)
    app.post("/v1/predictive")(_predictive)
    app.post("/v1/chat/completions")(_chat)
    app.post("/v1/completions")(_completions)
    return app


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _health(request: Request) -> Response:
    if not _service(request).engine.alive():
        return unavailable("the engine has stopped; the server needs a restart").response()
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    """Whether every request can be answered. Those that need no linearised predictive are, even while its worker is
    loaded again."""
    _check_ready(request)
    linearizer = _service(request).linearizer
    if linearizer is not None:
        linearizer.check()
    return JSONResponse({"status": "ready"})


async def _version(request: Request) -> Response:
    return JSONResponse({"version": posterior.__version__})


async def _metrics(request: Request) -> Response:
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _models(request: Request) -> Response:
    registry = _service(request).registry
    return JSONResponse({"object": "list", "data": [_card(registry, name) for name in registry.served]})


async def _model(request: Request, name: str) -> Response:
    return JSONResponse(_card(_service(request).registry, _service(request).find(name).name))


def _card(registry: Registry, name: str) -> dict[str, Any]:
    served = registry.served[name]
    parent = None if served.posterior is None else registry.base.id
    card = {
        "id": name,
        "object": "model",
        "created": STARTED,
        "owned_by": "posterior-server",
        "root": served.label or name,
        "parent": parent,
    }
    return (
        card
        if served.posterior is None
        else {**card, "family": served.posterior.family, "predictives": list(served.predictives)}
    )


STARTED = int(time.time())


async def _predictive(request: Request) -> Response:
    return await _respond(
        request, "predictive", lambda body, _, observation: _service(request).predict(body, observation)
    )


async def _chat(request: Request) -> Response:
    return await _respond(request, "chat", partial(answers.reply, _service(request), "chat"))


async def _completions(request: Request) -> Response:
    return await _respond(request, "completions", partial(answers.reply, _service(request), "completion"))


async def _respond(request: Request, endpoint: str, handler: Handler) -> Response:
    """Read the body, run `handler` as long as the client stays, count the request, answer."""
    observation = Observation(_service(request).metrics, endpoint)
    try:
        _check_ready(request)
        body = await _read_json(request)
        result = await _while_connected(request, handler(body, request, observation))
    except Exception as error:
        failure = as_api_error(error)
        observation.end(failure.status)
        return failure.response()
    if result is None:
        observation.end(CLIENT_LEFT)
        return Response(status_code=CLIENT_LEFT)
    if isinstance(result, dict):
        observation.end(200)
        return JSONResponse(result)
    return StreamingResponse(_observed(result, observation), media_type="text/event-stream")


async def _observed(events: AsyncIterator[str], observation: Observation) -> AsyncIterator[str]:
    status = CLIENT_LEFT
    try:
        async for event in events:
            yield event
        status = 200
    except Exception as error:  # too late for a status: the stream says it
        failure = as_api_error(error)
        status = failure.status
        yield f"data: {json.dumps(failure.body())}\n\n"
    finally:
        observation.end(status)


def _check_ready(request: Request) -> None:
    if not request.app.state.ready:
        raise unavailable("the server is warming up; try again shortly")
    if not _service(request).engine.alive():
        raise unavailable("the engine has stopped; the server needs a restart")


async def _read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object of at most MAX_BODY_BYTES. Raises ApiError 400 or 413."""
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
        body = json.loads(bytes(chunks), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request("the body is not valid JSON") from error
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


async def _while_connected(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`; None, `work` cancelled, if the client leaves first. The body must have been read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        watch.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
