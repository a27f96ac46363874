"""A small server that answers like Posterior Server, on a real socket, for what is the client's own."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from tests.clients.asked import INPUT, KEY, QUESTIONS

ROOT = Path(__file__).parents[2]
STREAM = (ROOT / "tests/web/replies/chat.sse").read_text()  # of a real server, asked for "support"
Ask = Callable[..., tuple[object, str, str]]
POSTERIOR = "sentiment@0123456789ab"
RECORD: dict[str, Any] = {
    "answer": " positive",
    "confidence": 0.75,
    "calibrated": False,
    "calibration": None,
    "logprob": -0.2876820724517809,
    "answers": [
        {"answer": " negative", "probability": 0.25, "variance": 0.01, "std": 0.1, "interval": [0.125, 0.5]},
        {"answer": " positive", "probability": 0.75, "variance": 0.01, "std": 0.1, "interval": [0.5, 0.875]},
    ],
    "covariance": [[0.01, -0.01], [-0.01, 0.01]],
    "entropy": {"total": 0.5623351446, "aleatoric": 0.5, "epistemic": 0.0623351446},
    "variance": {"epistemic": 0.01, "total": 0.1875},
    "effective_particles": 8.0,
    "mc_error": 0.0,
}
LAW = {"posterior": POSTERIOR, "predictive": "linearized", "particles": 8}
DECISION_USAGE = {
    "input_tokens": 7,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 0,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 7,
}
MAP_TEXT = {"posterior": POSTERIOR, "predictive": "map", "calibrated": False}


@dataclass
class Stub:
    """The running server: where it is, and what it was asked."""

    url: str = ""
    key: str | None = None
    stream: str = STREAM
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def error(status: int, kind: str, message: str, code: str | None = None, **headers: str) -> JSONResponse:
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status, headers)


def build(stub: Stub) -> FastAPI:
    """The routes a client reads, with the answers and errors of the contract."""
    app = FastAPI()

    @app.middleware("http")
    async def authenticate(request: Request, call_next: Any) -> Response:
        stub.headers.append(dict(request.headers))
        if stub.key and request.headers.get("authorization") != f"Bearer {stub.key}":
            return error(401, "authentication_error", "a valid API key is needed")
        response: Response = await call_next(request)
        return response

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        names = {"base": None, "sentiment/map": "base", "sentiment": "base"}
        cards = [
            {"id": name, "object": "model", "created": 0, "owned_by": "posterior", "parent": parent}
            for name, parent in names.items()
        ]
        return {"object": "list", "data": cards}

    @app.post("/v1/predictive")
    async def predictive(request: Request) -> Any:
        body = await request.json()
        stub.bodies.append(body)
        if body["model"] == "busy" and len(stub.bodies) < 3:
            return error(503, "server_error", "warming up", **{"Retry-After": "0.01"})
        if body["model"] == "broken":
            return {"data": [{"answer": " positive"}]}
        if body["model"] not in ("sentiment", "busy"):
            return error(404, "invalid_request_error", f"no model `{body['model']}` is served", "model_not_found")
        rows = body.get("inputs") or body.get("prompts") or body.get("messages") or []
        if body.get("answers") and len(set(body["answers"])) < len(body["answers"]):
            return error(400, "invalid_request_error", "two answers are the same")
        for row in rows:
            if isinstance(row, dict) and "text" not in row:
                return error(400, "invalid_request_error", f"unknown field {[*row]}; the task has the field `text`")
        extra = {"per_particle": [[0.2, 0.8]] * 8} if body.get("per_particle") else {}
        data = [{"index": i, **RECORD, **extra} for i in range(len(rows))]
        usage = {"prompt_tokens": 7 * len(rows), "completion_tokens": 0, "total_tokens": 7 * len(rows)}
        head = {"id": "pred-1", "object": "predictive", "created": 1, "model": "sentiment"}
        return {**head, **LAW, "data": data, "usage": usage}

    def choice(body: dict[str, Any]) -> dict[str, Any]:
        if body["model"] == "base":
            return {}
        return {"uncertainty": {**LAW, **RECORD} if body.get("uncertainty", {}).get("answers") else MAP_TEXT}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await request.json()
        head = {"id": "cmpl-1", "created": 1, "model": body["model"], "object": "text_completion"}
        base = {"index": 0, "logprobs": None}
        last = {**base, "text": " positive", "finish_reason": "stop", **choice(body)}
        if not body.get("stream"):
            return {**head, "choices": [last]}
        first = {**base, "text": "", "finish_reason": None}
        return events([{**head, "choices": [one]} for one in (first, last)])

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()
        if body["model"] == "support":
            stub.bodies.append(body)
            return StreamingResponse(iter([stub.stream]), media_type="text/event-stream")
        head = {"id": "chatcmpl-1", "created": 1, "model": body["model"]}
        message = {"role": "assistant", "content": " positive"}
        base = {"index": 0, "logprobs": None}
        if not body.get("stream"):
            done = {**base, "message": message, "finish_reason": "stop", **choice(body)}
            return {**head, "object": "chat.completion", "choices": [done]}
        first = {**base, "delta": message, "finish_reason": None}
        last = {**base, "delta": {}, "finish_reason": "stop", **choice(body)}
        return events([{**head, "object": "chat.completion.chunk", "choices": [one]} for one in (first, last)])

    @app.post("/v1/decisions")
    async def decisions(request: Request) -> Any:
        body = await request.json()
        stub.bodies.append(body)
        if body["model"] == "broken":
            return {"id": "decision-1", "answers": []}
        held = "max_risk" in body.get("uncertainty", {})
        answers = [decided(question, held) for question in body["questions"]]
        head = {"id": "decision-1", "object": "decision", "created": 1, "model": POSTERIOR}
        return {**head, "answers": answers, "usage": {**DECISION_USAGE}}

    return app


def decided(question: dict[str, Any], held: bool) -> dict[str, Any]:
    """An answer that prefers the last option; if it is `held` back, a refusal, except of a predicate."""
    kind = question["type"]
    levels = question.get("levels", [])
    choices = [each["value"] for each in question.get("choices", [])] or [*range(len(levels))] or [True, False]
    p = [1 / 2 ** len(choices[1:])] + [1 / 2**number for number in range(len(choices) - 1, 0, -1)]
    pairs = [*zip(choices, p, strict=True)]
    options = [{**RECORD["answers"][0], "answer": one, "probability": each} for one, each in pairs]
    record = {**LAW, **RECORD, "answer": choices[-1], "confidence": p[-1], "answers": options}
    head = {"type": kind, "name": question.get("name"), "uncertainty": record}
    if kind == "predicate":
        return {**head, "probability": p[0]}
    if held:
        reason = "unfamiliar" if kind == "choice" else "ambiguous"
        strange = {"familiarity": 0.01} if reason == "unfamiliar" else {}
        return {**head, "type": "refusal", "uncertainty": {**record, **strange, "reason": reason}}
    if kind == "choice":
        rows = [{"value": one, "probability": each} for one, each in pairs]
        return {**head, "choice": choices[-1], "confidence": p[-1], "probabilities": rows}
    rows = [{"label": level["label"], "value": n, "probability": p[n]} for n, level in enumerate(levels)]
    score = sum(n * each for n, each in enumerate(p))
    return {**head, "score": score, "confidence": p[-1], "probabilities": rows}


def events(chunks: list[dict[str, Any]]) -> StreamingResponse:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
    return StreamingResponse(iter(lines), media_type="text/event-stream")


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Run an app on a free port; yields its API's base URL."""
    web = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=web.run)
    thread.start()
    while not web.started:
        thread.join(0.01)
    yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}/v1"
    web.should_exit = True
    thread.join()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A running stub; the environment points no client elsewhere."""
    for name in ("POSTERIOR_API_KEY", "POSTERIOR_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    running = Stub()
    with serving(build(running)) as running.url:
        yield running


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs `posterior ask`, as its console script does: (status, stdout, stderr)."""
    from server.cli import main  # the environment of other people's clients cannot

    def run(*arguments: str, url: str = "http://127.0.0.1:9/v1", stdin: bytes = b"") -> tuple[object, str, str]:
        monkeypatch.setenv("POSTERIOR_BASE_URL", url)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            status: object = main(["ask", *arguments])
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def api() -> Iterator[str]:
    """The base URL of the real server's API. Where the tests' environment has no vLLM, $SERVER_PYTHON runs it."""
    command = [os.environ["SERVER_PYTHON"], "-m", "tests.server.running"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'clients' / 'python'}"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    yield process.stdout.readline().strip() + "/v1"
    process.stdin.close()
    assert process.wait(120) == 0
    process.stdout.close()


@pytest.fixture(scope="session")
def direct(api: str) -> Any:
    """What the server says without anything between: its answers, as JSON."""
    body = {"model": "mood", "input": INPUT, "questions": QUESTIONS}
    reply = httpx.post(f"{api}/decisions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=300)
    assert reply.status_code == 200, reply.text
    return reply.json()["answers"]
