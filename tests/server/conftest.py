from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.http.app import create_app
from server.metrics import Metrics
from server.services.predictive import Service
from tests.server import fakes


@pytest.fixture
def engine() -> fakes.Engine:
    return fakes.Engine()


@pytest.fixture
def linearizer() -> fakes.Linearizer:
    return fakes.Linearizer()


@pytest.fixture
def service(engine: fakes.Engine, linearizer: fakes.Linearizer) -> Service:
    metrics = Metrics()
    fakes.registry().describe(metrics)
    return Service(fakes.registry(), engine, linearizer, fakes.Tokenizer(), metrics)  # type: ignore[arg-type]


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    app = create_app(service, None)
    app.state.ready = True
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was handed to the engine beside the body, of each text."""
    found: list[Any] = []
    whole = fakes.Engine.complete

    async def complete(engine: Any, body: Any, call: Any, trace: Any = None) -> Any:
        found.append(call)
        return await whole(engine, body, call, trace)

    monkeypatch.setattr(fakes.Engine, "complete", complete)
    return found


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error object of a failed response: OpenAI's four fields, one line, nothing of our inside."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message and "\n" not in message and "Traceback" not in message and "pydantic" not in message
    return dict(body["error"])
