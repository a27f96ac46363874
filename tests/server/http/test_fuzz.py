"""Requests made up from /openapi.json against the application over a fake engine; `make fuzz` sends more, also to a
real server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from server.access.keys import Keys
from server.http.app import create_app
from server.services.predictive import Service
from tests.server import fuzzing
from tests.server.running import KEY, Running, free_port

CASES = int(os.environ.get("CASES", "30"))


@contextmanager
def served(service: Service, key: str | None) -> Iterator[str]:
    app = create_app(service, Keys(key))
    app.state.ready = True
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.config.port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("key", [None, "s3cret"], ids=["open", "without the key"])
def test_every_answer_is_an_answer_or_a_documented_error(service: Service, key: str | None) -> None:
    service.engine.max_model_len = 2**20  # a byte is a token to the fake
    with served(service, key) as url:
        document = fuzzing.document(url, {"Authorization": f"Bearer {key}"})
        sent = fuzzing.run(document, url, {}, list(service.registry.served), CASES, allowed=key is None)
    assert sent >= CASES * 0.7


@pytest.mark.parametrize("allowed", [True, False], ids=["with the key", "without"])
def test_a_real_server_too(server: Running, allowed: bool) -> None:
    right = {"Authorization": f"Bearer {KEY}"}
    document = fuzzing.document(server.url, right)
    models = [server.base_name, "gang", "mood", "mood/map"]
    sent = fuzzing.run(document, server.url, right if allowed else {}, models, CASES // 2, allowed=allowed)
    assert sent >= CASES // 2 * 0.7
    assert server.predict(model="mood", inputs=[{"text": "still there?"}])["data"]
