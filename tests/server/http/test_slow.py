"""Clients that are slow, silent, or many, on a real socket over a fake engine."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from select import select

import httpx
import pytest

from server.http import body as bodies
from server.services.predictive import Service
from tests.server.http.test_fuzz import served

ASKED = {"model": "mood", "inputs": [{"text": "hello"}]}
MANY = 200


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with served(service, None) as url:
        yield url


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def head(length: int) -> bytes:
    lines = (
        "POST /v1/predictive HTTP/1.1",
        "Host: here",
        "Content-Type: application/json",
        f"Content-Length: {length}",
    )
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_a_body_that_does_not_come_is_408_and_nobody_waits_for_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 2)
    content = json.dumps(ASKED).encode()
    with connected(url) as slow:
        slow.sendall(head(len(content)) + content[:10])
        assert httpx.post(f"{url}/v1/predictive", json=ASKED).status_code == 200
        assert not select([slow], [], [], 0)[0], "the other one was answered first"
        answer = b""
        while part := slow.recv(2**16):  # up to the end of the connection
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ") and b"connection: close" in answer.lower()
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "body_timeout" and "2 seconds" in error["message"]


def test_a_body_that_comes_byte_by_byte_is_answered(url: str) -> None:
    content = json.dumps(ASKED).encode()
    with connected(url) as slow:
        slow.sendall(head(len(content)))
        for byte in content:
            slow.sendall(bytes([byte]))
        assert slow.recv(2**16).startswith(b"HTTP/1.1 200 ")


def test_many_connections(url: str) -> None:
    """As many silent ones, half of whom leave in the middle of a request, hold up none of those that ask."""
    with ExitStack() as stack:
        silent = [stack.enter_context(connected(url)) for _ in range(MANY)]
        for one in silent[: MANY // 2]:
            one.sendall(head(1000))
            one.close()
        limits = httpx.Limits(max_connections=MANY)
        with ThreadPoolExecutor(MANY) as pool, httpx.Client(base_url=url, timeout=60, limits=limits) as client:
            answers = list(pool.map(lambda _: client.post("/v1/predictive", json=ASKED), range(MANY)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == MANY
    first, *others = [{**answer.json(), "id": "", "created": 0} for answer in answers]
    assert all(other["data"] == first["data"] for other in others)
