"""Start, warm-up and signals of `posterior serve`, with a fake engine, in a process of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.server.running import free_port

PROGRAM = """
import asyncio, signal, sys
from posterior.errors import PosteriorError
from server import logs
from server.errors import EngineLost
from server.http.app import create_app
from server.http.lobby import Lobby
from server.http.listening import listen
from server.http.place import Place
from server.main import _curl
from server.metrics import Metrics
from server.services.predictive import Service
from tests.server import fakes

class Engine(fakes.Engine):
    # Dead from SIGUSR1 on, as vLLM's client is when its engine core was killed; what waits gets an error.
    async def score(self, *args, **options):
        if len(self.scored) < 6:
            return await super().score(*args, **options)  # the warm-up: five models, and a sentence of the base
        while self.living:
            await asyncio.sleep(0.05)
        raise EngineLost

async def main(port, delay):
    engine = Engine(delay=delay) if DIES else fakes.Engine(delay=delay)
    signal.signal(signal.SIGUSR1, lambda *_: setattr(engine, "living", False))
    service = Service(fakes.registry(), engine, None, fakes.Tokenizer(), Metrics())
    with Lobby(Place("127.0.0.1", port)) as lobby:
        ready = lambda: print(_curl(service.registry, lobby, keyed=False), file=sys.stderr)
        seconds = float(sys.argv[4]) if len(sys.argv) > 4 else 30.0
        await listen(create_app(service, None), lobby.leave(), service, ready, drain_seconds=seconds)

DIES = sys.argv[3:4] == ["dies"]
logs.start()
try:
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2])))
except PosteriorError as error:
    sys.exit(f"posterior: {error}")
"""
ASK = {"model": "gang", "inputs": [{"text": "x"}]}


@pytest.fixture
def url() -> str:
    return f"http://127.0.0.1:{free_port()}"


@contextlib.contextmanager
def started(url: str, delay: float, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    port = url.rpartition(":")[2]
    command = [sys.executable, "-c", PROGRAM, port, str(delay), *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def asked(url: str) -> tuple[threading.Thread, list[httpx.Response]]:
    """A thread that asks, begun some moments ago, and its answer when it has ended."""
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/predictive", json=ASK)))
    asking.start()
    time.sleep(0.3)
    return asking, answers


def said(process: subprocess.Popen[bytes]) -> str:
    assert process.stderr is not None
    return process.stderr.read().decode()


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
    with started(url, delay=1) as process:
        wait_for(f"{url}/health", 200)
        assert status(f"{url}/ready") == 503, "still warming up: five models, a second each"
        wait_for(f"{url}/ready", 200)
        asking, answers = asked(url)
        process.send_signal(signal.SIGTERM)
        wait_for(f"{url}/ready", 503)
        assert status(f"{url}/health") == 200
        late = httpx.post(f"{url}/v1/predictive", json=ASK)
        assert late.status_code == 503 and late.headers["retry-after"] and "stopping" in late.text
        asking.join()
        assert answers[0].status_code == 200, "what had begun is finished"
        assert process.wait(10) == 0 and f"curl {url}/v1/predictive" in said(process)
        assert status(f"{url}/health") is None


@pytest.mark.long
def test_what_runs_too_long_ends_with_an_error(url: str) -> None:
    """The engine answers no more from the seventh question on."""
    with started(url, 0.0, "dies", "0.3") as process:
        wait_for(f"{url}/ready", 200)
        asking, answers = asked(url)
        process.send_signal(signal.SIGTERM)
        asking.join(10)
        assert answers[0].status_code == 503 and answers[0].headers["retry-after"]
        assert "the server is stopping" in answers[0].json()["error"]["message"]
        assert process.wait(10) == 0 and "some requests still ran after 0.3 s" in said(process)


@pytest.mark.long
def test_a_second_signal_waits_no_longer(url: str) -> None:
    with started(url, 0.0, "dies", "60") as process:
        wait_for(f"{url}/ready", 200)
        asking, answers = asked(url)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        asking.join(10)
        assert answers[0].status_code == 503 and process.wait(10) == 0


def test_a_dead_engine_ends_the_server_after_what_waits_is_answered(url: str) -> None:
    with started(url, 0.0, "dies") as process:
        wait_for(f"{url}/ready", 200)
        asking, answers = asked(url)
        process.send_signal(signal.SIGUSR1)
        asking.join(10)
        assert answers[0].status_code == 503 and "retry-after" in answers[0].headers
        assert process.wait(10) == 1
        last = said(process).strip().splitlines()[-1]
        assert last.startswith("posterior: the engine has stopped, and the server with it")
