"""Start, warm-up and signals of `posterior serve`, with a fake engine, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest

from tests.server.running import free_port

PROGRAM = """
import argparse, asyncio, sys
from server.app import create_app
from server.lobby import Lobby
from server.main import _listen
from server.metrics import Metrics
from server.predictive import Service
from tests.server import fakes

async def main(port, delay):
    engine = fakes.Engine(delay=delay)
    service = Service(fakes.registry(), engine, None, fakes.Tokenizer(), Metrics())
    args = argparse.Namespace(host="127.0.0.1", port=port, api_key=None)
    with Lobby("127.0.0.1", port) as lobby:
        await _listen(create_app(service, None), lobby, service, args, 0.0)

asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
"""
ASK = {"model": "gang", "inputs": [{"text": "x"}]}


@pytest.fixture
def url() -> str:
    return f"http://127.0.0.1:{free_port()}"


def start(url: str, delay: float) -> subprocess.Popen[bytes]:
    port = url.rpartition(":")[2]
    return subprocess.Popen([sys.executable, "-c", PROGRAM, port, str(delay)], stderr=subprocess.PIPE)


def status(url: str) -> int | None:
    try:
        return httpx.get(url).status_code
    except httpx.TransportError:
        return None


def wait_for(url: str, wanted: int) -> None:
    deadline = time.monotonic() + 60
    while status(url) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ready_after_the_warm_up_and_drained_on_sigterm(url: str) -> None:
    process = start(url, delay=0.5)
    try:
        wait_for(f"{url}/health", 200)
        assert status(f"{url}/ready") == 503, "still warming up: five models, half a second each"
        wait_for(f"{url}/ready", 200)
        answers: list[Any] = []
        asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/predictive", json=ASK)))
        asking.start()
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.15)
        assert status(f"{url}/health") is None, "no new connections"
        asking.join()
        assert answers[0].status_code == 200, "what had begun is finished"
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert f"curl {url}/v1/predictive" in process.stderr.read().decode()
    finally:
        process.kill()
        process.communicate()
