"""The API keys: default-deny, compared in constant time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request

from server.access.keys import NOBODY, Key, Keys
from server.http.errors import ApiError
from server.metrics import Metrics


def require_key(
    keys: Keys | None, metrics: Metrics, *, public: frozenset[str], admin: frozenset[str]
) -> Callable[[Request], Awaitable[None]]:
    """A FastAPI dependency: only `Authorization: Bearer KEY` passes (anything if there are no keys), and leaves the key
    in `request.state.key`, None where none is needed.

    Args:
        public: path templates of routes that need no key.
        admin: path templates of routes that need the key of an admin.
    """

    async def check(request: Request) -> None:
        path = request.scope["route"].path
        request.state.key = None
        if not keys or path in public:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Starlette reads header bytes as Latin-1; the way back gives the client's bytes
        key = keys.find(given.strip(" \t").encode("latin-1"))
        if key is None or scheme.lower() != "bearer":
            metrics.key_requests.labels(NOBODY, "401").inc()
            raise ApiError(401, "missing or wrong API key; send `Authorization: Bearer <key>`", code="invalid_api_key")
        if path in admin and not key.admin:
            metrics.key_requests.labels(key.name, "403").inc()
            raise ApiError(403, "this needs the key of an admin; ask whoever runs the server", code="admin_required")
        request.state.key = key

    return check


def enter(key: Key | None) -> None:
    """Count a request for an answer. Raises ApiError 429 for a key that has used up its minute."""
    wait = None if key is None else key.quota.enter()
    if wait is not None:
        raise ApiError(
            429,
            f"this key may use {wait.limit} {wait.what} a minute; try again in {wait.seconds} s",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(wait.seconds)},
        )
