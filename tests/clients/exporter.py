"""The contract's metrics on the stub server."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


def exporter(app: FastAPI) -> FastAPI:
    registry = CollectorRegistry()
    R: dict[str, Any] = {"registry": registry}
    law = ["posterior", "predictive"]
    requests = Counter("posterior_requests", "", ["posterior", "endpoint", "predictive", "status"], **R)
    duration = Histogram("posterior_request_duration_seconds", "", ["posterior", "endpoint", "predictive"], **R)
    prompt = Counter("posterior_prompt_tokens", "", ["posterior"], **R)
    generated = Counter("posterior_generated_tokens", "", ["posterior"], **R)
    answers = Counter("posterior_answers", "", law, **R)
    confidence = Histogram("posterior_confidence", "", law, buckets=[i / 20 for i in range(1, 21)], **R)
    epistemic = Histogram("posterior_epistemic_entropy_nats", "", law, **R)
    total = Histogram("posterior_total_entropy_nats", "", law, **R)
    batch = Histogram("posterior_linearized_batch_size", "", **R)
    queue = Histogram("posterior_linearized_queue_seconds", "", **R)
    Gauge("posterior_ready", "", **R).set(1)
    info = Gauge("posterior_info", "", ["posterior", "hash", "family", "base"], **R)
    info.labels("sentiment", "0123456789ab", "laplace", "base").set(1)
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        Gauge(name, "", **R)
    ttft = Histogram("vllm:time_to_first_token_seconds", "", **R)

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        endpoint = request.url.path
        if request.method == "POST":
            requests.labels("sentiment", endpoint, "linearized", str(response.status_code)).inc()
            duration.labels("sentiment", endpoint, "linearized").observe(0.1)
            prompt.labels("sentiment").inc(7)
            generated.labels("sentiment").inc(2)
            answers.labels("sentiment", "linearized").inc()
            confidence.labels("sentiment", "linearized").observe(0.75)
            epistemic.labels("sentiment", "linearized").observe(0.06)
            total.labels("sentiment", "linearized").observe(0.56)
            for one in (batch, queue, ttft):
                one.observe(1)
        return response

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
