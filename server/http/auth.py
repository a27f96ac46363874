"""The API key: default-deny, compared in constant time."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable

from fastapi import Request

from posterior.errors import PosteriorError
from server.http.errors import ApiError


def secret(given: str | None) -> str | None:
    """The key without the blanks around it; None where nothing is left, since an empty key is no key.

    Raises PosteriorError for a key that clients cannot send in a header.
    """
    key = (given or "").strip()
    if not key.isprintable():  # nor is what was no UTF-8
        raise PosteriorError("the API key holds a character that no header can carry; use letters, digits and '-'")
    return key or None


def require_key(key: str | None, public: frozenset[str] = frozenset()) -> Callable[[Request], Awaitable[None]]:
    """A FastAPI dependency: only `Authorization: Bearer <key>` passes (anything if `key` is None).

    Routes whose path template is in `public` need no key. Raises PosteriorError for an empty key.
    """
    if key is not None and secret(key) != key:
        raise PosteriorError("the API key is empty or has blanks around it; give a key, or None for no key")

    async def check(request: Request) -> None:
        if key is None or request.scope["route"].path in public:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Starlette reads header bytes as Latin-1; the way back gives the client's bytes
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip(" \t").encode("latin-1"), key.encode()):
            raise ApiError(401, "missing or wrong API key; send `Authorization: Bearer <key>`", code="invalid_api_key")

    return check


def check_exposure(host: str, key: str | None) -> None:
    """Raises PosteriorError if `host` is reachable from other machines and no key protects it."""
    if secret(key) is not None or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise PosteriorError(
            f"refusing to listen on {host} without a key: set --api-key (or POSTERIOR_API_KEY), or use --host 127.0.0.1"
        )
