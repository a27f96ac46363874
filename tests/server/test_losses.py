"""One real server loses what it is made of, piece by piece: a posterior that vLLM refuses, the linearised predictive's
worker, and at last the engine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.sealed import rehash
from tests.server import folders
from tests.server.running import free_port

ASK = {"inputs": [{"text": "good"}]}


def unknown_to_vllm(folder: Path) -> None:
    """A module whose name vLLM does not know, in files that the folder's hashes fit."""
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        save_file({key.replace("layers.0.self_attn.q_proj", "layers.0.self_attn.query"): value
                   for key, value in load_file(path).items()}, path)  # fmt: skip
    rehash(folder)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    base, root = folders.cut_base(tmp_path), tmp_path / "posteriors"
    folders.laplace(root, base)
    folders.particles(root, base).path.rename(root / "bad")
    unknown_to_vllm(root / "bad")
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "serve", "--base", str(base.path), "--port", str(port)]
    command += ["--posteriors", str(root), "--particles", "2", "--max-model-len", "1024"]
    environment = {**os.environ, "POSTERIOR_CACHE": str(tmp_path / "cache")}
    environment.pop("POSTERIOR_API_KEY", None)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: process.poll() is not None or status(f"{url}/ready") == 200, 240)
        assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
        yield url, process
    finally:
        process.kill()
        process.wait()


def status(url: str, **body: Any) -> int | None:
    with contextlib.suppress(httpx.TransportError):
        return (httpx.post(url, json=body, timeout=60) if body else httpx.get(url)).status_code
    return None


def wait_until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_losses(process: tuple[str, subprocess.Popen[bytes]], tmp_path: Path) -> None:
    url, server = process
    said = (tmp_path / "log").read_text()
    assert re.search(r"posterior: warning: bad is not served: .*expected target modules.*query.*", said)
    names = [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]]
    assert names[1:] == ["mood", "mood/map"], "the rest is served"
    assert "posterior_refused 1.0" in httpx.get(f"{url}/metrics").text

    children = psutil.Process(server.pid).children(recursive=True)
    (core,) = [child for child in children if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline())]
    (worker,) = [child for child in children if child.pid != core.pid and child.memory_info().rss > 2**28]
    worker.kill()
    wait_until(lambda: status(f"{url}/ready") == 503, 10)
    assert status(f"{url}/v1/predictive", model="mood", **ASK) == 503
    assert status(f"{url}/v1/predictive", model="mood", predictive="mixture", **ASK) == 200
    wait_until(lambda: status(f"{url}/ready") == 200, 120)
    assert status(f"{url}/v1/predictive", model="mood", **ASK) == 200
    assert "posterior_linearized_restarts_total 1.0" in httpx.get(f"{url}/metrics").text

    children = psutil.Process(server.pid).children(recursive=True)
    answers: dict[bool, httpx.Response] = {}

    def write(stream: bool) -> None:
        body = {"model": "mood", "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": stream}
        answers[stream] = httpx.post(f"{url}/v1/completions", json=body, timeout=60)

    writing = [threading.Thread(target=write, args=(stream,)) for stream in (False, True)]
    for thread in writing:
        thread.start()
    time.sleep(1)
    core.kill()
    killed = time.monotonic()
    for thread in writing:
        thread.join(30)
    assert answers[False].status_code == 503 and answers[False].headers["retry-after"]
    *_, last, done = answers[True].text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable" and done == "data: [DONE]"
    assert server.wait(30) == 2 and time.monotonic() - killed < 30
    assert (tmp_path / "log").read_text().strip().splitlines()[-1].startswith("posterior: the engine has stopped")
    assert not psutil.wait_procs(children, timeout=10)[1], "no process is left behind"
