"""A real server for tests: vLLM in float32, the real base, two posteriors of random weights, two small random models
that tell meanings apart, HTTP with a key, and a file of more keys.

`python -m tests.server.running` prints its URL and runs until standard input ends: for tests of another environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from posterior.models import base as base_models
from posterior.models.base import Base
from posterior.storage.artefact import Posterior
from tests.posterior.meaning import tiny
from tests.server import folders

PARTICLES = 3
KEY = "test-key"
OPTIONS = ("--dtype", "float32", "--tool-call-parser", "hermes")


@dataclass(frozen=True)
class Running:
    """The server, what it serves, and where its adapters lie."""

    url: str
    base: Base
    base_name: str
    mood: Posterior
    gang: Posterior
    cache: Path
    process: subprocess.Popen[bytes]

    @property
    def meaning(self) -> Path:
        """Where the models lie that tell meanings apart: "embedding" and "nli"."""
        return self.cache.parent / "meaning"

    def post(self, path: str, **body: Any) -> Any:
        response = httpx.post(f"{self.url}{path}", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
        assert response.status_code == 200, response.text
        return response.json()

    def get(self, path: str) -> Any:
        response = httpx.get(f"{self.url}{path}", headers={"Authorization": f"Bearer {KEY}"}, timeout=120)
        assert response.status_code == 200, response.text
        return response.json()

    def predict(self, **body: Any) -> Any:
        return self.post("/v1/predictive", **body)

    def metrics(self) -> dict[str, float]:
        """Every sample by its name with labels."""
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def running_requests(self) -> float:
        return sum(
            v
            for k, v in self.metrics().items()
            if k.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(root: Path, *options: str) -> Iterator[Running]:
    """A server of the posteriors "gang" and "mood" below `root`, up to the end of the block."""
    base = base_models.resolve()
    (root / "posteriors").mkdir()
    gang, mood = folders.particles(root / "posteriors", base), folders.laplace(root / "posteriors", base)
    mood, gang = folders.compare(mood, base), folders.grade(gang, base)
    models = {
        "embedding": tiny.encoder(root / "meaning/embedding"),
        "nli": tiny.classifier(root / "meaning/nli"),
    }
    meaning = [word for name, folder in models.items() for word in (f"--meaning-{name}", str(folder))]
    with launched(root, base, *meaning, *options) as (url, process):
        yield Running(url, base, base.path.name, mood, gang, root / "cache", process)


@contextlib.contextmanager
def launched(root: Path, base: Base, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL and process of a server of all posteriors in root/posteriors, up to the end of the block, where it must
    end as it should."""
    with started(root, base, *options) as (url, process):
        try:
            yield url, process
        finally:
            process.send_signal(signal.SIGTERM)
            status, said = process.wait(60), (root / "log").read_text()
            assert status == 0 and "leaked" not in said, said


@contextlib.contextmanager
def started(root: Path, base: Base, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The same of a server that may end in any way, at the latest with the block."""
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "serve", "--base", str(base.path), "--port", str(port)]
    command += ["--posteriors", str(root / "posteriors"), "--particles", str(PARTICLES), "--max-model-len", "1024"]
    write_keys(root, guest='models = ["mood"]')
    own = {"CACHE": root / "cache", "API_KEY": KEY, "KEYS": root / "keys.toml"}
    own["OUTCOMES"] = f"sqlite:///{root}/outcomes.db"
    environment = {**os.environ, **{f"POSTERIOR_{name}": str(value) for name, value in own.items()}}
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", process, root / "log")
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def write_keys(root: Path, **rights: str) -> None:
    """The file of keys that a server of `root` reads; each key is its name."""
    tables = [
        f'[keys.{name}]\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n{each}\n'
        for name, each in rights.items()
    ]
    (root / "keys.toml").write_text("".join(tables))
    (root / "keys.toml").chmod(0o600)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200:
                return
        time.sleep(0.5)
    pytest.fail(f"the server did not become ready:\n{log.read_text()[-4000:]}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), *OPTIONS) as running:
        print(running.url, flush=True)
        sys.stdin.read()
