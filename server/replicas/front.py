"""The front of the replicas: an ASGI application that sends each request to one of them, and to another one if the
first is lost before anything of its answer was sent to the client.

Every request of ours may be sent twice. An answer changes nothing, a report of an outcome that was stored is `known`
the second time, and what was deleted stays so. What changes one server alone is refused.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from server.http import errors
from server.http.errors import ApiError
from server.replicas.affinity import affinity
from server.replicas.exposition import joined
from server.replicas.messages import Busy, Forwarded, Head, Headers, ReplicaLost, Replicas

ATTEMPTS = 3  # replicas that a request is sent to
MAX_BODY_BYTES = 4 * 2**20  # as each replica has it (server/http/schemas.py)
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
OF_ONE_SERVER = ("/v1/aliases", "/v1/posteriors")  # where an admin changes what a server serves
SOON = {"Retry-After": "1"}
REPLICA = "x-posterior-replica"  # of an answer: who gave it
# Of one connection, not of the message (RFC 9110, section 7.6.1), or made anew by whoever sends.
OF_A_CONNECTION = ("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade")
OWN = {*OF_A_CONNECTION, "proxy-authenticate", "proxy-authorization", "content-length", "date", "host", "server"}


def create_front(replicas: Replicas) -> Starlette:
    """The application over the replicas."""

    async def forward(request: Request) -> Response:
        return await _answer(replicas, await _forwarded(request))

    async def metrics(request: Request) -> Response:
        try:
            answers = await replicas.ask_all(await _forwarded(request))
        except ReplicaLost as error:
            raise ApiError(503, "not all replicas answered in time; try again", code="unavailable") from error
        refused = next((each for each in answers if each.head.status != 200), None)
        if refused is not None:
            return _response(refused.head, refused.body)
        return Response(joined({each.head.replica: each.body.decode() for each in answers}), media_type="text/plain")

    app = Starlette(routes=[Route("/metrics", metrics), Route("/{path:path}", forward, methods=METHODS)])
    errors.register(app)
    return app


async def _forwarded(request: Request) -> Forwarded:
    """Raises ApiError for a request that no replica should see."""
    target = request.scope.get("raw_path", request.url.path.encode()).decode("latin-1")
    query = request.scope["query_string"].decode("latin-1")
    headers = tuple((name.decode("latin-1"), value.decode("utf-8", "replace")) for name, value in request.headers.raw)
    if request.method not in ("GET", "HEAD", "OPTIONS") and request.url.path.startswith(OF_ONE_SERVER):
        raise ApiError(
            409,
            "this would change one replica of several; change what all serve in the deployment file, and run "
            "`serve deploy`",
            code="replicated",
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    return Forwarded(request.method, f"{target}?{query}" if query else target, _passed(headers), bytes(body))


def _passed(headers: Headers) -> Headers:
    """The headers that the next one gets too."""
    return tuple((name, value) for name, value in headers if name.lower() not in OWN)


async def _answer(replicas: Replicas, request: Forwarded) -> Response:
    """The answer of the first replica that gives one. Raises ApiError if none does.

    A 503 means that nothing was done, as after the loss of an engine: another replica is asked, and if that is no
    better, the client gets the 503 of the last one.
    """
    key, avoided = affinity(request.body), set[str]()
    refused: Response | None = None
    for _ in range(ATTEMPTS):
        try:
            response = await _begun(replicas.send(request, key, frozenset(avoided)))
        except ReplicaLost as lost:
            avoided |= {lost.replica} if lost.replica else set()
            request = _again(request)
            continue
        except Busy as error:
            raise ApiError(429, "all replicas are busy; try again", code="overloaded", headers=SOON) from error
        if response.status_code != 503:
            return response
        refused = response
        avoided.add(response.headers[REPLICA])
    return refused or ApiError(503, "each replica that was asked was lost; try again", code="unavailable").response()


def _again(request: Forwarded) -> Forwarded:
    """The request without its id. The lost replica may have stored its answer under it: an outcome must not be one of
    an answer that the client never got."""
    headers = tuple((name, value) for name, value in request.headers if name.lower() != "x-request-id")
    return Forwarded(request.method, request.target, headers, request.body)


async def _begun(parts: AsyncGenerator[Head | bytes]) -> Response:
    """A response of which nothing was sent yet: one with its whole body, or a stream with its first event.

    Raises ReplicaLost, and closes `parts` unless a stream goes on.
    """
    goes_on = False
    try:
        head = await anext(parts)
        assert isinstance(head, Head)
        if dict(head.headers).get("content-type", "").startswith("text/event-stream"):
            events = _events(parts)
            first = await anext(events, b"")
            goes_on = True
            return _response(head, _stream(first, events, parts))
        return _response(head, b"".join([part async for part in parts if isinstance(part, bytes)]))
    finally:
        if not goes_on:
            await parts.aclose()


def _response(head: Head, body: bytes | AsyncIterator[bytes]) -> Response:
    response = Response(body, head.status) if isinstance(body, bytes) else StreamingResponse(body, head.status)
    own = [(name, value) for name, value in response.raw_headers if name == b"content-length"]
    passed = [(name.lower().encode(), value.encode()) for name, value in _passed(head.headers)]
    response.raw_headers = [*own, *passed, (REPLICA.encode(), head.replica.encode())]
    return response


async def _events(parts: AsyncIterator[Head | bytes]) -> AsyncGenerator[bytes]:
    """The body in whole events: one that was broken off is no event."""
    rest = b""
    async for part in parts:
        assert isinstance(part, bytes)
        whole, end, rest = (rest + part).rpartition(b"\n\n")
        if end:
            yield whole + end
    if rest:
        yield rest


async def _stream(
    first: bytes, events: AsyncGenerator[bytes], parts: AsyncGenerator[Head | bytes]
) -> AsyncIterator[bytes]:
    """The events, and an error as the last one if the replica is lost: too late for a status."""
    async with aclosing(parts), aclosing(events):
        yield first
        try:
            async for event in events:
                yield event
        except ReplicaLost:
            error = ApiError(503, "the replica that wrote this was lost; ask again", code="unavailable")
            yield f"data: {json.dumps(error.body())}\n\n".encode()
