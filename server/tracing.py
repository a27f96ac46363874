"""Traces for OpenTelemetry, if a collector is named: a span for each request, and in it those of workers and vLLM.

Without a collector nothing is imported, and `span` does nothing. vLLM has a tracer of its own, which continues the
trace that `headers` names.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from posterior.errors import PosteriorError

PROTOCOL, VLLM_PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
PATH = "/v1/traces"  # below a collector's address, by OpenTelemetry's own rule

_tracer: Any = None


def collector(given: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The URL that spans are sent to, None for no traces. `given`: the collector's address, else OpenTelemetry's
    variables say it."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    whole = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if given is None and whole:
        return whole
    address = (given or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT") or "").rstrip("/")
    if not address:
        return None
    return address if _protocol(environment) == "grpc" else f"{address.removesuffix(PATH)}{PATH}"


def _protocol(environment: Mapping[str, str]) -> str:
    return environment.get(VLLM_PROTOCOL) or environment.get(PROTOCOL) or "http/protobuf"


def start(url: str) -> Any:
    """Trace from now on, and send spans to `url`. Returns the provider: its `shutdown` sends what is left.

    Raises PosteriorError where OpenTelemetry is not installed.
    """
    protocol = _protocol(os.environ)
    kind = "grpc" if protocol == "grpc" else "http"
    try:
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = importlib.import_module(f"opentelemetry.exporter.otlp.proto.{kind}.trace_exporter").OTLPSpanExporter
    except ImportError as error:
        raise PosteriorError(
            f"traces need OpenTelemetry, which is not installed ({error.name}): pip install 'posterior-server[otel]', "
            "or leave --otlp-endpoint and OTEL_EXPORTER_OTLP_ENDPOINT out"
        ) from error
    os.environ[VLLM_PROTOCOL] = protocol  # vLLM's own default is another one
    os.environ.setdefault("OTEL_SERVICE_NAME", "posterior-server")
    return use(BatchSpanProcessor(exporter(endpoint=url)))


def use(processor: Any) -> Any:
    """Trace from now on into this span processor. Returns the provider."""
    global _tracer
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider()  # not the global one, which is vLLM's
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("posterior.server")
    return provider


def stop() -> None:
    """Trace no more."""
    global _tracer
    _tracer = None


@contextlib.contextmanager
def span(name: str, *, caller: Mapping[str, str] | None = None, **attributes: Any) -> Iterator[Any]:
    """The time of a block, in the span around it. `caller`: the headers of a request, which begins a trace or continues
    the one that they name. Gives the span, None without traces."""
    if _tracer is None:
        yield None
        return
    from opentelemetry.trace import SpanKind

    kind = SpanKind.INTERNAL if caller is None else SpanKind.SERVER
    context = None if caller is None else _propagator().extract(caller)
    with _tracer.start_as_current_span(name, context=context, kind=kind, attributes=attributes) as current:
        yield current


def headers() -> dict[str, str]:
    """The current span, as headers name it to whoever continues its trace; empty without traces."""
    found: dict[str, str] = {}
    if _tracer is not None:
        _propagator().inject(found)
    return found


def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()
