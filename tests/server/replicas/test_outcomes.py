"""Outcomes over the front: two applications share a database, and one of them is lost with what it was about to say."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from sqlalchemy import func, select

from server.http.app import create_app
from server.replicas.front import create_front
from server.replicas.messages import Forwarded, Head, ReplicaLost, Whole
from server.services.predictive import Service
from server.store import tables
from server.store.store import Store
from tests.server import fakes

pytestmark = pytest.mark.asyncio


class Applications:
    """Replicas that are applications. The names in `dying` are lost when their work is done, before they have said
    more than how the answer begins."""

    def __init__(self, apps: dict[str, Any]) -> None:
        self.apps = apps
        self.dying: set[str] = set()
        self.asked: list[str] = []

    async def send(self, request: Forwarded, key: str, avoided: Collection[str]) -> AsyncGenerator[Head | bytes]:
        name = next(each for each in self.apps if each not in avoided)
        self.asked.append(name)
        transport = httpx.ASGITransport(self.apps[name])
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            reply = await client.request(request.method, request.target, headers=request.headers, content=request.body)
        yield Head(name, reply.status_code, tuple(reply.headers.items()))
        if name in self.dying:
            raise ReplicaLost(name)
        yield reply.content

    async def ask_all(self, request: Forwarded) -> Sequence[Whole]:
        """None: only /metrics asks all."""
        return ()


@pytest.fixture
def engine() -> fakes.Engine:
    return fakes.Engine(max_model_len=4096)


@pytest.fixture
def stores(service: Service, tmp_path: Path) -> Iterator[list[Store]]:
    stores = [Store(f"sqlite:///{tmp_path}/outcomes.db", service.metrics) for _ in range(2)]
    yield stores
    for store in stores:
        store.close()


@pytest.fixture
def replicas(service: Service, stores: list[Store]) -> Applications:
    apps = {}
    for name, store in zip("ab", stores, strict=True):
        own = Service(
            service.registry, service.engine, service.linearizer, service.tokenizer, service.metrics, None, store
        )
        apps[name] = create_app(own, None)
        apps[name].state.ready = True
    return Applications(apps)


@pytest_asyncio.fixture
async def client(replicas: Applications) -> AsyncGenerator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_front(replicas)), base_url="http://front"
    ) as client:
        yield client


async def reply_id(client: httpx.AsyncClient) -> str:
    reply = await client.post("/v1/predictive", json={"model": "gang", "inputs": [{"text": "a"}]})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["id"])


def stored(store: Store) -> int:
    with store._engine.connect() as connection:
        return int(connection.execute(select(func.count()).select_from(tables.outcomes)).scalar_one())


async def test_a_report_whose_acknowledgement_was_lost_is_acknowledged_by_the_other_once(
    client: httpx.AsyncClient, replicas: Applications, stores: list[Store]
) -> None:
    id = await reply_id(client)
    replicas.dying = {"a"}
    replicas.asked.clear()
    reply = await client.post("/v1/outcomes", json={"id": id, "correct": True})
    assert replicas.asked == ["a", "b"]
    assert reply.status_code == 200 and reply.json()["data"][0]["status"] == "known", "a had stored it"
    assert stored(stores[1]) == 1


async def test_a_report_that_nobody_acknowledged_is_an_error(client: httpx.AsyncClient, replicas: Applications) -> None:
    id = await reply_id(client)
    replicas.dying = {"a", "b"}
    replicas.apps["c"] = replicas.apps["b"]
    replicas.dying.add("c")
    reply = await client.post("/v1/outcomes", json={"id": id, "correct": True})
    assert reply.status_code == 503 and "Retry-After" in reply.headers
    replicas.dying = set()
    again = await client.post("/v1/outcomes", json={"id": id, "correct": True})
    assert again.json()["data"][0]["status"] == "known"


async def test_a_lost_answer_leaves_an_answer_that_nobody_has_but_one_id_for_each(
    client: httpx.AsyncClient, replicas: Applications
) -> None:
    """The first replica has stored an answer under the client's id of the request; the second answers under another."""
    replicas.dying = {"a"}
    chat = {"model": "gang", "prompt": "it was", "temperature": 0.0}
    reply = await client.post("/v1/completions", json=chat, headers={"X-Request-Id": "mine"})
    assert reply.status_code == 200 and "mine" not in reply.json()["id"]
    known = await client.post("/v1/outcomes", json={"id": reply.json()["id"], "correct": True})
    assert known.json()["data"][0]["status"] in ("stored", "known")
