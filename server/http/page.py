"""The page at `/`: static files of clients/web, which hold no data and ask for the key where the server has one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

from fastapi import Response

from server.http.errors import ApiError

KINDS: Mapping[str, str] = {".js": "text/javascript", ".css": "text/css"}
HEADERS = {  # nothing but the page's own files runs or loads, and no string becomes markup
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
FOLDER = files("server.http") / "web"  # a link to clients/web; in a wheel, a folder
PARTS = {file.name: kind for file in FOLDER.iterdir() for suffix, kind in KINDS.items() if file.name.endswith(suffix)}


async def show() -> Response:
    """GET /"""
    return _file("index.html", "text/html")


async def part(name: str) -> Response:
    """GET /web/{name}: what the page needs."""
    if name not in PARTS:
        raise ApiError(404, "there is no such file")
    return _file(name, PARTS[name])


def _file(name: str, kind: str) -> Response:
    return Response((FOLDER / name).read_bytes(), media_type=f"{kind}; charset=utf-8", headers=HEADERS)
