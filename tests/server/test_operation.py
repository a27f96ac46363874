"""The real engine with JSON logs and a collector of traces: whoever logs, a line is an object, and vLLM's spans
stand in the requests' own."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from posterior.models import base as base_models
from tests.server import folders
from tests.server.running import KEY, launched

KEYED = {"Authorization": f"Bearer {KEY}"}


@contextmanager
def collecting() -> Iterator[tuple[str, list[Any]]]:
    """The address of a collector, and the spans that it gets."""
    spans: list[Any] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = ExportTraceServiceRequest.FromString(body)
            spans.extend(span for each in request.resource_spans for scope in each.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()


@pytest.mark.long
def test_logs_and_traces_of_the_real_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_models.resolve()
    folders.laplace(tmp_path / "posteriors", base)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    file = tmp_path / "server.toml"
    file.write_text('log_format = "json"\ndrain_seconds = 5\n')
    with (
        collecting() as (collector, spans),
        launched(tmp_path, base, "--config", str(file), "--otlp-endpoint", collector) as (url, _),
    ):
        for path, body in {
            "/v1/completions": {"prompt": "A secret", "max_tokens": 4},
            "/v1/predictive": {"prompts": ["A secret"], "answers": [" a", " b"], "predictive": "mixture"},
        }.items():
            headers = KEYED | {"X-Request-Id": f"mine{path.replace('/', '.')}"}
            response = httpx.post(f"{url}{path}", json=body | {"model": "mood"}, headers=headers, timeout=60)
            assert response.status_code == 200 and response.headers["x-request-id"] == headers["X-Request-Id"]
            if path == "/v1/completions":
                assert re.fullmatch(r"cmpl-mine\.v1\.completions-[0-9a-f]{8}", response.json()["id"])
        linear = {"prompts": ["A secret"], "answers": [" a", " b"], "model": "mood"}
        assert httpx.post(f"{url}/v1/predictive", json=linear, headers=KEYED, timeout=60).status_code == 200

    text = (tmp_path / "log").read_text()
    assert not re.search(r"^(\(|[A-Z]+[ :])", text, re.MULTILINE), "nothing in vLLM's own form"
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]  # others print without a logger
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert {"posterior", "posterior.access"} <= {line["logger"] for line in lines}
    vllm = [line for line in lines if line["logger"].startswith("vllm")]
    assert {line.get("process") for line in vllm} >= {None, "EngineCore"}, "of both processes"
    assert "A secret" not in json.dumps(lines)

    requests = {span.span_id: span for span in spans if span.name.startswith("POST ")}
    inside = {name: [span for span in spans if span.name == name] for name in ("llm_request", "linearized")}
    assert len(requests) == 3
    asked = {requests[span.parent_span_id].name for span in inside["llm_request"] if span.parent_span_id in requests}
    assert asked == {"POST /v1/completions", "POST /v1/predictive"}
    assert [requests[span.parent_span_id].name for span in inside["linearized"][-1:]] == ["POST /v1/predictive"]
