"""Pages that come with the server: files without data, which need no key and ask for one where the server has one."""

from __future__ import annotations

from importlib.resources import files

from fastapi import Response

from server.http.errors import ApiError

KINDS = {".js": "text/javascript", ".css": "text/css"}
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Page:
    """The index.html of a folder beside this file, and its scripts and styles, which are read once."""

    def __init__(self, folder: str, **headers: str) -> None:
        """headers: of each file, beside HEADERS, with _ for -."""
        place = files("server.http") / folder
        self.headers = {**HEADERS, **{name.replace("_", "-"): value for name, value in headers.items()}}
        self._index = (place / "index.html").read_bytes()
        self.parts = {
            file.name: (file.read_bytes(), kind)
            for file in place.iterdir()
            for ending, kind in KINDS.items()
            if file.name.endswith(ending)
        }

    async def show(self) -> Response:
        """GET of the page."""
        return self._response(self._index, "text/html")

    async def part(self, name: str) -> Response:
        """GET of what the page needs. Raises ApiError 404."""
        if name not in self.parts:
            raise ApiError(404, "there is no such file")
        return self._response(*self.parts[name])

    def _response(self, content: bytes, kind: str) -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8", headers=self.headers)


DOCS = Page(
    "docs",
    Content_Security_Policy="default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
)
WEB = Page(  # a link to clients/web; in a wheel, a folder. Nothing but its own files runs, and no string becomes markup
    "web",
    Content_Security_Policy="default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    Cross_Origin_Opener_Policy="same-origin",
    Cache_Control="no-cache",
)
