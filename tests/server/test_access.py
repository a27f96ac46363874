"""Keys of a file on the real server: rights, tokens as vLLM counts them, and SIGHUP, which ends no process."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.running import Running, write_keys


@pytest.fixture(scope="module")
def url(server: Running) -> Iterator[str]:
    """The server's, whose keys are put back afterwards."""
    yield server.url
    renew(server, guest='models = ["mood"]')


def renew(server: Running, **rights: str) -> None:
    """Change the file of keys, and wait until the server has read it."""
    newest = f"at-{time.monotonic_ns()}"
    write_keys(server.cache.parent, **rights, **{newest: ""})
    server.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 10
    while get(server.url, newest, "/version").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def get(url: str, key: str, path: str) -> Any:
    return httpx.get(f"{url}{path}", headers={"Authorization": f"Bearer {key}"})


def complete(url: str, key: str, **body: Any) -> Any:
    return httpx.post(
        f"{url}/v1/completions",
        json={"prompt": "It was", **body},
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    )


def test_a_key_of_the_file_sees_its_models(url: str) -> None:
    assert [card["id"] for card in get(url, "guest", "/v1/models").json()["data"]] == ["mood", "mood/map"]
    assert complete(url, "guest", model="gang").status_code == 404 and get(url, "guest", "/metrics").status_code == 403
    assert httpx.get(f"{url}/ready").status_code == 200 and httpx.get(f"{url}/version").status_code == 401


def test_tokens_are_counted_as_vllm_counts_them(url: str, server: Running) -> None:
    renew(server, few="tokens_per_minute = 5")
    reply = complete(url, "few", model="mood", max_tokens=4, temperature=0)
    used = reply.json()["usage"]["total_tokens"]
    assert reply.status_code == 200 and used >= 5
    assert server.metrics()['posterior_key_tokens_total{key="few"}'] == used
    again = complete(url, "few", model="mood", max_tokens=4)
    assert again.status_code == 429 and 0 < int(again.headers["retry-after"]) <= (used - 4) * 12
    assert get(url, "guest", "/version").status_code == 401, "it is no longer in the file"


@pytest.mark.parametrize("model", ["mood", "mood/map"])
def test_a_stream_that_is_left_costs_what_was_read(url: str, server: Running, model: str) -> None:
    key = f"left-{model.replace('/', '-')}"
    renew(server, **{key: ""})
    body = {"model": model, "prompt": "It was", "stream": True, "max_tokens": 500, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as response:
        lines = response.iter_lines()
        read = [next(lines) for _ in range(20)]
    deadline = time.monotonic() + 10
    name = f'posterior_key_tokens_total{{key="{key}"}}'
    while name not in (found := server.metrics()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sum(line.startswith("data: ") for line in read) <= found[name] < 500
    assert found[f'posterior_key_requests_total{{key="{key}",status="499"}}'] == 1
