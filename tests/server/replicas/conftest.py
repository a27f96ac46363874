"""Replicas without Ray and without servers: each answers as its script says."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import pytest_asyncio

from server.replicas.affinity import order
from server.replicas.front import create_front
from server.replicas.messages import Forwarded, Head, Headers, ReplicaLost, Whole

JSON: Headers = (("content-type", "application/json"), ("date", "today"), ("x-request-id", "r1"))
EVENTS: Headers = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))
Part = Head | bytes | Exception


def said(name: str, body: Any, status: int = 200) -> list[Part]:
    """A whole answer in JSON, in two parts."""
    content = json.dumps(body).encode()
    return [Head(name, status, JSON), content[:5], content[5:]]


def streamed(name: str, *parts: bytes) -> list[Part]:
    return [Head(name, 200, EVENTS), *parts]


@dataclass
class Scripted:
    """Replicas by their names, each with what it answers to its first request, its second, ...; its last answer again
    and again. An exception in an answer is raised there."""

    scripts: dict[str, Sequence[Iterable[Part]]] = field(default_factory=dict)
    asked: list[tuple[str, Forwarded]] = field(default_factory=list)
    avoided: list[frozenset[str]] = field(default_factory=list)
    closed: int = 0
    late: bool = False

    async def send(self, request: Forwarded, key: str, avoided: Collection[str]) -> AsyncGenerator[Head | bytes]:
        name = order(key, dict.fromkeys(self.scripts, 0), avoided)[0]
        before = sum(1 for each, _ in self.asked if each == name)
        self.asked.append((name, request))
        self.avoided.append(frozenset(avoided))
        try:
            for part in self.scripts[name][min(before, len(self.scripts[name]) - 1)]:
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            self.closed += 1

    async def ask_all(self, request: Forwarded) -> Sequence[Whole]:
        if self.late:
            raise ReplicaLost
        found = []
        for name, scripts in self.scripts.items():
            self.asked.append((name, request))
            head, *body = scripts[0]
            if isinstance(head, Head):
                found.append(Whole(head, b"".join(part for part in body if isinstance(part, bytes))))
        return found


def both(script: Iterable[Part], other: Iterable[Part]) -> dict[str, Sequence[Iterable[Part]]]:
    """Two replicas, of which the one that is asked first answers with `script`, and the one after it with `other`."""
    first, second = order("None ", {"a": 0, "b": 0})
    return {first: [script], second: [other]}


def lost(name: str | None = None) -> ReplicaLost:
    return ReplicaLost(name)


@pytest.fixture
def replicas() -> Scripted:
    return Scripted()


@pytest_asyncio.fixture
async def client(replicas: Scripted) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_front(replicas), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        yield client
