"""The HTTP application: exactly the routes below, and nothing of vLLM's."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

import posterior
from server.access.keys import Key, Keys, owner
from server.errors import EngineLost, RequestError, Stopping, Unavailable
from server.http import answers, decisions, errors, managing, openapi, outcomes, predictive, systemone
from server.http.auth import enter, require_key
from server.http.body import read_json
from server.http.decision_replies import DecisionReply, SystemOneReply
from server.http.errors import as_api_error
from server.http.outcome_replies import OutcomesDeleted, OutcomesReply, OutcomesReport
from server.http.records import Reply
from server.http.replies import (
    ChatReply,
    CompletionReply,
    ModelCard,
    ModelList,
    PredictiveReply,
    Status,
    Version,
)
from server.http.requests import HEADER, Requests
from server.http.running import Running
from server.http.schemas import (
    ChatRequest,
    CompletionRequest,
    DecisionRequest,
    Outcome,
    OutcomesRequest,
    PredictiveRequest,
    SystemOneRequest,
    TextRequest,
)
from server.http.static import DOCS, WEB
from server.metrics import Observation
from server.services.predictive import Service
from server.services.registry import Served
from server.store.values import Reporter

T = TypeVar("T")
Handler = Callable[[dict[str, Any], Request, Observation], Awaitable[Reply]]

CLIENT_LEFT = 499  # nginx's number for a client that closed the connection
# The routes that need no key: they hold no data.
PUBLIC = frozenset({"/health", "/ready", "/", "/web/{name}", "/docs", "/docs/{name}"})
ADMIN = frozenset({"/metrics", *managing.PATHS})  # those for admins: they name every model, or change what is served
MOST = 1024  # requests for answers at a time, unless the server's owner says otherwise
EXPOSED = (HEADER, "Retry-After", *(  # headers that pages of other origins may read
    f"X-RateLimit-{each}-{what}" for each in ("Limit", "Remaining", "Reset") for what in ("Requests", "Tokens")
))  # fmt: skip
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for nginx, which would hold a stream back
STREAM: dict[str, Any] = {"text/event-stream": {"schema": {}}}  # OpenAPI 3.1 has no schema of events


def create_app(
    service: Service,
    keys: Keys | None,
    *,
    origins: Sequence[str] = (),
    most: int = MOST,
    log_prompts: bool = False,
) -> FastAPI:
    """The application over a running service; without keys it answers everybody. `app.state.ready` is False until its
    owner has warmed it up, and `app.state.running` is how it stops what runs.

    Args:
        origins: whose pages may call it from a browser; "*": anybody's.
        most: requests for answers at a time; more get 429.
        log_prompts: whether the bodies of requests are logged.
    """
    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # a redirect would name the host that the client says, before the key is looked at
        dependencies=[Depends(require_key(keys, service.metrics, public=PUBLIC, admin=ADMIN))],
    )
    app.state.service = service
    app.state.ready = False
    app.state.running = Running(most)
    errors.register(app)
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=EXPOSED
        )
    app.add_middleware(Requests, running=app.state.running, prompts=log_prompts)  # the last one is the outermost
    _route(app)
    app.state.description = functools.cache(partial(openapi.describe, app, key=bool(keys), public=PUBLIC))
    return app


def _route(app: FastAPI) -> None:
    """All routes, with what each takes and answers."""
    for path, handler, summary, reply, statuses in (
        ("/health", _health, "Whether the process lives", Status, (503,)),
        ("/ready", _ready, "Whether requests are answered", Status, (503,)),
        ("/version", _version, "The server's version", Version, (401,)),
        ("/v1/models", _models, "The models that are served", ModelList, (401,)),
        ("/v1/models/{name:path}", _model, "One of them", ModelCard, (401, 404)),
    ):
        app.get(path, summary=summary, responses=openapi.replies(reply, *statuses))(handler)
    for path, handler, summary, body, answer in (
        ("/v1/predictive", _predictive, "Posterior predictives of many inputs", PredictiveRequest, PredictiveReply),
        ("/v1/decisions", _decisions, "OpenAI's decisions", DecisionRequest, DecisionReply),
        ("/v1/systemone", _systemone, "vLLM's decisions", SystemOneRequest, SystemOneReply),
        ("/v1/chat/completions", _chat, "OpenAI's chat completions", ChatRequest, ChatReply),
        ("/v1/completions", _completions, "OpenAI's completions", CompletionRequest, CompletionReply),
    ):
        responses = openapi.replies(answer, 400, 401, 404, 408, 413, 429, 503)
        if issubclass(body, TextRequest):
            responses[200]["content"] = STREAM
        app.post(path, summary=summary, openapi_extra=openapi.body(body), responses=responses)(handler)
    responses = openapi.replies(OutcomesReply, 400, 401, 404, 408, 409, 413, 429, 503)
    summary, extra = "What turned out to be true of answers", openapi.body(OutcomesRequest, Outcome)
    app.post("/v1/outcomes", summary=summary, openapi_extra=extra, responses=responses)(_outcomes)
    responses = openapi.replies(OutcomesReport, 401, 404, 429, 503)
    summary = "What the outcomes say of the answers"
    app.get("/v1/outcomes/report", summary=summary, responses=responses)(_report_outcomes)
    responses = openapi.replies(OutcomesDeleted, 401, 404, 503)
    summary = "Delete the answers of a reply, and their outcomes"
    app.delete("/v1/outcomes/{id:path}", summary=summary, responses=responses)(_delete_outcomes)
    managing.add(app)
    metrics = openapi.replies(None, 401, 403)
    app.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse, responses=metrics)(_metrics)
    app.get("/openapi.json", summary="This description", responses=openapi.replies(None, 401))(openapi.show)
    html = openapi.replies(None)
    app.get("/docs", summary="This description for people", response_class=HTMLResponse, responses=html)(DOCS.show)
    app.get("/docs/{name}", summary="A file of that page", responses=openapi.replies(None, 404))(DOCS.part)
    app.get("/", summary="A page to ask with", response_class=HTMLResponse, responses=html)(WEB.show)
    app.get("/web/{name}", summary="A file of that page", responses=openapi.replies(None, 404))(WEB.part)


def _service(request: Request) -> Service:
    """The service as the request's key sees it: with the models that it may use."""
    service: Service = request.app.state.service
    key = _key(request)
    return service if key is None or key.models is None else service.only(key.models)


def _key(request: Request) -> Key | None:
    key: Key | None = request.state.key
    return key


async def _health(request: Request) -> Response:
    if not _service(request).engine.alive():
        raise Unavailable("the server does not work; its log says why")
    return JSONResponse({"status": "ok"})


async def _ready(request: Request) -> Response:
    """Whether every request can be answered. Those that need no worker are, even while one is loaded again. Why not is
    for the log, since nobody has to show a key here."""
    try:
        _check_ready(request)
        service = _service(request)
        for worker in (service.linearizer, service.comparer):
            if worker is not None:
                worker.check()
    except RequestError as error:
        raise Unavailable("the server is not ready; try again shortly") from error
    return JSONResponse({"status": "ready"})


async def _version(request: Request) -> Response:
    return JSONResponse({"version": posterior.__version__})


async def _metrics(request: Request) -> Response:
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _models(request: Request) -> Response:
    service = _service(request)
    cards = [_card(service, served) for served in service.registry.served.values()]
    return JSONResponse({"object": "list", "data": cards})


async def _model(request: Request, name: str) -> Response:
    if not name:  # GET /v1/models/
        return await _models(request)
    return JSONResponse(_card(_service(request), _service(request).find(name.removesuffix("/"))))


def _card(service: Service, served: Served) -> dict[str, Any]:
    """The JSON of one model name."""
    card = {
        "id": served.name,
        "object": "model",
        "created": STARTED,
        "owned_by": "posterior-server",
        "root": served.key,
        "parent": None if served.posterior is None else service.base.id,
        "max_model_len": service.engine.max_model_len,
    }
    if served.posterior is None:
        return card
    task = served.posterior.task
    asked = {"task": task.kind, "fields": list(task.fields)}
    return {**card, "family": served.posterior.family, "predictives": list(served.predictives), **asked}


STARTED = int(time.time())


async def _predictive(request: Request) -> Response:
    return await _respond(
        request, "predictive", lambda body, _, observation: predictive.reply(_service(request), body, observation)
    )


async def _decisions(request: Request) -> Response:
    return await _respond(
        request, "decisions", lambda body, _, observation: decisions.reply(_service(request), body, observation)
    )


async def _systemone(request: Request) -> Response:
    return await _respond(
        request, "systemone", lambda body, _, observation: systemone.reply(_service(request), body, observation)
    )


async def _outcomes(request: Request) -> Response:
    return await _respond(
        request, "outcomes", lambda body, *_: outcomes.reply(_service(request), body, _reporter(request))
    )


def _reporter(request: Request) -> Reporter:
    key = _key(request)
    return Reporter(owner(key), admin=key is not None and key.admin)


async def _report_outcomes(request: Request) -> Response:
    key = _key(request)
    enter(key)
    return _with_quota(JSONResponse(await outcomes.report(_service(request), _reporter(request))), key)


async def _delete_outcomes(request: Request, id: str) -> Response:
    return JSONResponse(await outcomes.delete(_service(request), id, _reporter(request)))


async def _chat(request: Request) -> Response:
    return await _respond(
        request,
        "chat",
        lambda body, request, observation: answers.reply(_service(request), "chat", body, request, observation),
    )


async def _completions(request: Request) -> Response:
    return await _respond(
        request,
        "completions",
        lambda body, request, observation: answers.reply(_service(request), "completion", body, request, observation),
    )


async def _respond(request: Request, endpoint: str, handler: Handler) -> Response:
    """The answer of `handler` to the body, which runs as long as the client stays. The request is counted."""
    key = _key(request)
    request.state.observation = observation = Observation(_service(request).metrics, endpoint, key)
    running: Running = request.app.state.running
    try:
        _check_ready(request)
        running.admit()
        enter(key)
        async with running.work():
            request.state.body = body = await read_json(request)
            result = await _while_connected(request, handler(body, request, observation))
    except Exception as error:
        failure = as_api_error(error)
        observation.end(failure.status)
        return _with_quota(failure.response(), key)
    if result is None:
        observation.end(CLIENT_LEFT)
        return Response(status_code=CLIENT_LEFT)
    if isinstance(result, dict):
        observation.end(200)
        return _with_quota(JSONResponse(result), key)
    return _with_quota(Events(_observed(result, observation, running), observation), key)


class Events(StreamingResponse):
    """Server-sent events of a request, which ends with them: also where its client leaves before the first."""

    def __init__(self, events: AsyncIterator[str], observation: Observation) -> None:
        super().__init__(events, media_type="text/event-stream", headers=UNBUFFERED)
        self._observation = observation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._observation.end(CLIENT_LEFT)


def _with_quota(response: Response, key: Key | None) -> Response:
    """The response, which says what is left of the minute of its key."""
    response.headers.update({} if key is None else key.quota.headers())
    return response


async def _observed(events: AsyncIterator[str], observation: Observation, running: Running) -> AsyncIterator[str]:
    """The same events; the request is counted at their end, and an error is the last of them. vLLM says nothing of the
    tokens of a stream that its client has left: each event that was sent counts as one."""
    status, sent = CLIENT_LEFT, 0
    try:
        async with running.work():
            async for line in events:
                yield line
                sent += 1
        status = 200
    except Exception as error:  # too late for a status: the stream says it
        failure = as_api_error(error)
        status = failure.status
        yield f"data: {json.dumps(failure.body())}\n\n"
    finally:
        if not observation.tokens:
            observation.count_tokens(0, sent)
        observation.end(status)


def _check_ready(request: Request) -> None:
    if not _service(request).engine.alive():
        raise EngineLost
    if request.app.state.running.stopping:
        raise Stopping
    if not request.app.state.ready:
        raise Unavailable("the server is warming up; try again shortly")


async def _while_connected(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`; None, `work` cancelled, if the client leaves first. The body must have been read."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())  # one that nobody waits for says nothing
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
