"""The page with canned replies, for tests in a browser: the server's own files and headers, and real replies.

`python -m tests.web.stub` prints its URL and runs until standard input ends. `python -m tests.web.real --record` makes
the replies anew.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from server.http.static import WEB
from tests.server.running import free_port

REPLIES = Path(__file__).parent / "replies"
KEY = "test-key"
CHUNK_SECONDS = 0.01


def create_app() -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/")(WEB.show)
    app.get("/web/{name}")(WEB.part)
    app.post("/v1/outcomes")(_outcome)
    app.api_route("/{path:path}", methods=["GET", "POST"])(_canned)
    return app


async def _canned(request: Request, path: str) -> Response:
    if request.headers.get("authorization") != f"Bearer {KEY}":
        return _failure(401, "missing or wrong API key")
    body: dict[str, Any] = await request.json() if request.method == "POST" else {}
    name = reply_name(path, body)
    if name.endswith(".sse"):
        return StreamingResponse(_stream(name), media_type="text/event-stream")
    reply = json.loads((REPLIES / name).read_text())
    return JSONResponse(reply, status_code=400 if "error" in reply else 200)


def reply_name(path: str, body: dict[str, Any]) -> str:
    """The file that answers a request."""
    options = body.get("uncertainty") or {}
    if path == "v1/decisions":
        kind = "refusal" if "max_risk" in options else body["questions"][0]["type"]
        return f"decision-{kind}{'-map' if options.get('predictive') == 'map' else ''}.json"
    if path == "v1/chat/completions":
        return "chat.sse" if body.get("stream") else "meanings.json"
    return {"v1/models": "models.json", "v1/predictive": "predictive.json", "version": "version.json"}[path]


async def _stream(name: str) -> AsyncIterator[str]:
    for event in (REPLIES / name).read_text().split("\n\n"):
        if event.strip():
            yield f"{event}\n\n"
            await asyncio.sleep(CHUNK_SECONDS)


async def _outcome(request: Request) -> Response:
    body = await request.json()
    result = {"id": body["id"], "index": body["index"], "status": "stored", "correct": body["correct"]}
    return JSONResponse({"object": "outcomes", "data": [result]})


def _failure(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "", "param": None, "code": None}}, status_code=status)


if __name__ == "__main__":
    port = free_port()
    config = uvicorn.Config(create_app(), port=port, log_level="error")
    threading.Thread(target=uvicorn.Server(config).run, daemon=True).start()
    print(f"http://127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    os._exit(0)
