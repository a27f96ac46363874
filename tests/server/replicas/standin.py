"""A stand-in for `posterior serve`, in milliseconds: it loads, answers, streams and stops as its options say."""

from __future__ import annotations

import http.server
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

OPTIONS = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
STARTED = time.monotonic()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802
        loading = time.monotonic() - STARTED < float(OPTIONS.get("--loads", 0))
        self.answer(503 if loading and self.path == "/ready" else 200, b"{}")

    def do_POST(self) -> None:  # noqa: N802
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/crash":
            os._exit(9)
        if self.path == "/half":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"half")
            self.wfile.flush()
            time.sleep(0.1)
            os._exit(9)
        time.sleep(float(OPTIONS.get("--answers-after", 0)))
        headers = "".join(f"{name}: {value}\n" for name, value in self.headers.items())
        self.answer(201, f"{self.path} {headers}\n".encode("latin-1") + body)

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Twice", "1")
        self.send_header("X-Twice", "2")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    if "--ends" in OPTIONS:
        sys.exit(int(OPTIONS["--ends"]))
    server = http.server.ThreadingHTTPServer((OPTIONS["--host"], int(OPTIONS["--port"])), Handler)

    def stop(*_: object) -> None:
        if "--deaf" not in OPTIONS:
            threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    if "--pid" in OPTIONS:
        Path(OPTIONS["--pid"]).write_text(str(os.getpid()))
    server.serve_forever(0.02)


if __name__ == "__main__":
    main()
