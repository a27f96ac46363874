"""Around the application: each request gets an id, a span, and a line in the log."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs, tracing
from server.http.errors import as_api_error
from server.http.running import Running
from server.metrics import NO_MODEL

HEADER = "X-Request-Id"
ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # others could forge lines of logs, or be too long for an id of a reply
PROBES = frozenset({"/health", "/ready", "/metrics"})  # they come every few seconds: only failures are logged
LONGEST_BODY = 65536  # characters of a request that are logged


def request_id(given: str | None) -> str:
    """The id that the client gave, if it is sane, else a new one."""
    return given if given is not None and ID.fullmatch(given) else uuid.uuid4().hex


def engine_headers(request: Request) -> Headers:
    """What vLLM learns of a request's headers: an id, which no other request has, since vLLM makes the reply's own of
    it, and the span that it belongs to. Other headers would let clients choose, for instance, where it runs."""
    return Headers({HEADER: f"{request.state.id}-{uuid.uuid4().hex[:8]}", **tracing.headers()})


class Requests:
    """ASGI middleware. Leaves the id in `request.state.id`. An error that nobody foresaw is answered here, so that its
    answer has the id too. prompts: whether bodies are logged, where `request.state.body` has one."""

    def __init__(self, app: ASGIApp, running: Running, *, prompts: bool) -> None:
        self._app = app
        self._running = running
        self._prompts = prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, headers = time.monotonic(), Headers(scope=scope)
        state = scope.setdefault("state", {})
        state["id"] = id = request_id(headers.get(HEADER))
        token, status = logs.REQUEST.set(id), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = id
            await send(message)

        try:
            with self._running.counted(), tracing.span(scope["method"], caller=headers, request_id=id) as span:
                try:
                    await self._app(scope, receive, named)
                except Exception as error:
                    if status:
                        raise
                    await as_api_error(error).response()(scope, receive, named)
                finally:
                    self._end(scope, span, status, time.monotonic() - start)
        finally:
            logs.REQUEST.reset(token)

    def _end(self, scope: Scope, span: Any, status: int, seconds: float) -> None:
        """Name the span, and write the line."""
        state, route = scope["state"], getattr(scope.get("route"), "path", None)
        observation, key = state.get("observation"), state.get("key")
        fields: dict[str, Any] = {"request_id": state["id"], "method": scope["method"], "route": route or "unknown"}
        fields |= {"status": (observation and observation.status) or status, "seconds": round(seconds, 4)}
        if key is not None:
            fields["key"] = key.name
        if observation is not None:
            served = (observation.posterior, observation.predictive) != (NO_MODEL, NO_MODEL)
            fields["model"] = state["body"]["model"] if served else NO_MODEL
            fields |= {"predictive": observation.predictive, "tokens": observation.tokens}
        if span is not None:
            span.update_name(f"{scope['method']} {route}" if route else scope["method"])
            span.set_attributes({f"posterior.{name}": value for name, value in fields.items()})
        if (route in PROBES and status < 400) or not logs.ACCESS.isEnabledFor(logging.INFO):
            return
        if self._prompts and "body" in state:
            fields["body"] = json.dumps(state["body"])[:LONGEST_BODY]
        logs.ACCESS.info("request", extra={"fields": fields})
