"""What holds the port while the server loads: it answers that it is loading, so that nobody waits and nobody else can
take the port."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from server.errors import Refused, Unavailable
from server.http.errors import RETRY_SECONDS, as_api_error
from server.http.place import Place
from server.http.requests import HEADER, request_id
from server.http.schemas import MAX_BODY_BYTES


class _Loading(BaseHTTPRequestHandler):
    """`/health` is well; everything else is not there yet."""

    timeout = 5.0  # seconds for a client to say what it wants
    error_content_type = "application/json"
    error_message_format = json.dumps(as_api_error(Refused("this is not HTTP")).body())

    def _answer(self) -> None:
        length = self.headers.get("Content-Length", "")
        known = length.isdecimal() and len(length) < 10
        self.rfile.read(min(int(length), MAX_BODY_BYTES) if known else 0)  # what is not read becomes a reset
        living = self.path.partition("?")[0] == "/health"
        loading = as_api_error(Unavailable("the server is loading; try again shortly"))
        answer = {"status": "ok"} if living else loading.body()
        content = json.dumps(answer).encode()
        self.send_response(200 if living else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.send_header(HEADER, request_id(self.headers.get(HEADER)))
        if not living:
            self.send_header("Retry-After", str(RETRY_SECONDS))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    tls: ssl.SSLContext | None = None

    def get_request(self) -> tuple[socket.socket, Any]:
        """The next connection. Its own thread shakes hands, when it first reads."""
        connection, address = self.socket.accept()
        if self.tls is not None:
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


class Lobby:
    """A listening socket at a place, which a thread answers until `leave` hands it over."""

    def __init__(self, place: Place) -> None:
        """Raises PosteriorError if the place cannot be had."""
        self.place = place
        self._stack = contextlib.ExitStack()
        self._listener = self._stack.enter_context(place.listening())
        own = self._listener.getsockname()
        self.port: int = own[1] if place.uds is None else 0
        self._server = _Server(("", 0), _Loading, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket, self._server.tls = self._listener, place.tls
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)

    @property
    def name(self) -> str:
        """Of the place, for the name of a file."""
        return str(self.port) if self.place.uds is None else self.place.uds.stem

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def leave(self) -> socket.socket:
        """The socket, which the thread no longer answers."""
        self._server.shutdown()
        self._thread.join()
        return self._listener

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.leave()
        self._stack.close()
