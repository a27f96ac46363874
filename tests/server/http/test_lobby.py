"""A port that is held while the server loads: answered, and nobody else's."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from posterior.errors import PosteriorError
from server.http.lobby import Lobby
from server.http.place import Place


def test_the_lobby_answers_that_the_server_is_loading_until_it_leaves() -> None:
    with Lobby(Place()) as lobby:
        url = f"http://127.0.0.1:{lobby.port}"
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        for method in ("GET", "POST", "DELETE"):
            response = httpx.request(method, f"{url}/v1/models", content=b"x" * 2**20 if method == "POST" else None)
            assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
            assert "loading" in response.json()["error"]["message"]
        assert not httpx.head(f"{url}/ready").content
        with socket.create_connection(("127.0.0.1", lobby.port)) as rude:
            rude.sendall(b"\xff\x00 not HTTP\r\n\r\n")
            assert b"not HTTP" in rude.recv(1000)
        listener = lobby.leave()
        with pytest.raises(httpx.ReadTimeout):
            httpx.get(f"{url}/health", timeout=0.2)
        late, _ = listener.accept()
        with late:
            assert late.recv(100).startswith(b"GET /health"), "who came in between is not lost"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_taken_port_is_refused_at_once(host: str) -> None:
    with Lobby(Place()) as first, pytest.raises(PosteriorError, match="choose another"):
        Lobby(Place(host, first.port))


def test_a_port_can_be_had_again_right_after_a_server_with_connections() -> None:
    with Lobby(Place()) as first:
        port = first.port
        httpx.get(f"http://127.0.0.1:{port}/health")
    with Lobby(Place(port=port)) as second:
        assert httpx.get(f"http://127.0.0.1:{second.port}/health").status_code == 200


@pytest.mark.parametrize("host", ["192.0.2.1", "256.256.256.256", "1:2:3"])
def test_an_address_that_is_not_ours_is_one_line(host: str) -> None:
    with pytest.raises(PosteriorError, match="cannot listen"):
        Lobby(Place(host))


def test_the_lobby_does_not_need_the_event_loop() -> None:
    async def busy() -> int:
        with Lobby(Place()) as lobby:
            return httpx.get(f"http://127.0.0.1:{lobby.port}/health", timeout=2).status_code  # blocks the loop

    assert asyncio.run(busy()) == 200
