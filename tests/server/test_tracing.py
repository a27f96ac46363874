"""Spans of requests and workers, in memory and on their way to a collector; none without one."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from posterior.errors import PosteriorError
from server import tracing

PREDICT = {"model": "gang", "inputs": [{"text": "x"}]}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = tracing.use(SimpleSpanProcessor(exporter))
    yield exporter
    tracing.stop()
    provider.shutdown()


def test_a_request_is_a_span_that_continues_its_client_s(client: TestClient, spans: InMemorySpanExporter) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"}
    assert client.post("/v1/predictive", json=PREDICT, headers=headers).status_code == 200
    (span,) = spans.get_finished_spans()
    assert span.name == "POST /v1/predictive" and span.kind.name == "SERVER"
    assert span.parent is not None and (f"{span.context.trace_id:x}", f"{span.parent.span_id:x}") == (TRACE[1:], PARENT)
    assert span.attributes is not None
    expected = {"request_id": "mine", "status": 200, "model": "gang", "predictive": "mixture"}
    assert {f"posterior.{name}": value for name, value in expected.items()}.items() <= span.attributes.items()


def test_vllm_continues_the_request_s_span(client: TestClient, spans: InMemorySpanExporter, calls: list[Any]) -> None:
    for stream in (False, True):
        body = {"model": "gang", "prompt": "x", "max_tokens": 1, "stream": stream}
        assert client.post("/v1/completions", json=body).status_code == 200
    for call, span in zip(calls, spans.get_finished_spans(), strict=True):
        own = span.context
        expected = f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"
        assert call.headers["traceparent"] == expected


def test_spans_stand_inside_each_other_and_without_a_tracer_there_are_none(spans: InMemorySpanExporter) -> None:
    with tracing.span("outer"), tracing.span("inner", prompts=3):
        assert tracing.headers()["traceparent"]
    inner, outer = spans.get_finished_spans()
    assert inner.parent is not None and inner.parent.span_id == outer.context.span_id
    assert inner.attributes == {"prompts": 3}
    tracing.stop()
    with tracing.span("nothing") as span:
        assert span is None and tracing.headers() == {}


def test_where_spans_go() -> None:
    traces, whole = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    assert tracing.collector(None, {}) is None
    assert tracing.collector("http://a:4318/", {whole: "http://c"}) == "http://a:4318/v1/traces"
    assert tracing.collector("http://a/v1/traces", {}) == "http://a/v1/traces"
    assert tracing.collector(None, {traces: "http://b"}) == "http://b/v1/traces"
    assert tracing.collector(None, {traces: "http://b", whole: "http://c/x"}) == "http://c/x"
    assert tracing.collector("http://a:4317", {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}) == "http://a:4317"
    assert tracing.collector("http://a", {"OTEL_SDK_DISABLED": "true"}) is None


def test_a_collector_gets_the_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[ExportTraceServiceRequest] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    for name in ("OTEL_SERVICE_NAME", tracing.PROTOCOL, tracing.VLLM_PROTOCOL):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        provider = tracing.start(f"http://127.0.0.1:{server.server_port}/v1/traces")
        with tracing.span("hello"):
            pass
        provider.shutdown()
        tracing.stop()
        server.shutdown()
    (resource,) = [each for request in got for each in request.resource_spans]
    assert [span.name for scope in resource.scope_spans for span in scope.spans] == ["hello"]
    named = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert named["service.name"] == "posterior-server"


def test_without_its_packages_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(PosteriorError, match=r"pip install 'posterior-server\[otel\]', or leave --otlp-endpoint"):
        tracing.start("http://localhost:4318/v1/traces")


def test_nothing_is_imported_without_a_collector() -> None:
    program = "import sys; from server import tracing; tracing.headers(); sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
