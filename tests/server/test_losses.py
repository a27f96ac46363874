"""One real server in its default precision, bfloat16: what that costs, against transformers + peft in float32. Then it
loses what it is made of, piece by piece: a posterior that vLLM refuses, the linearised predictive's worker, and at last
the engine."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from posterior.models import base as base_models
from tests.sealed import rehash
from tests.server import folders
from tests.server.mixture import Reference
from tests.server.running import KEY, PARTICLES, Running, started

# Of a candidate's probability. bfloat16 keeps 8 bits: a score between 16 and 32 is a multiple of 1/8, so that the
# difference of two is up to 1/8 off, which moves a probability of 1/2 by 0.03; the layers before it cost as much again.
TOLERANCE = 0.06
TEXTS = ["The food was wonderful.", "I waited an hour and left hungry.", "It was a restaurant.", "ok"]
ASK = {"inputs": [{"text": "good"}]}
pytestmark = pytest.mark.long
KEYED = {"Authorization": f"Bearer {KEY}"}


def unknown_to_vllm(folder: Path) -> None:
    """A module whose name vLLM does not know, in files that the folder's hashes fit."""
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        save_file({key.replace("layers.0.self_attn.q_proj", "layers.0.self_attn.query"): value
                   for key, value in load_file(path).items()}, path)  # fmt: skip
    rehash(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("half")


@pytest.fixture(scope="module")
def half(root: Path) -> Iterator[Running]:
    base, posteriors = base_models.resolve(), root / "posteriors"
    folders.particles(posteriors, base).path.rename(posteriors / "bad")
    unknown_to_vllm(posteriors / "bad")
    gang, mood = folders.particles(posteriors, base), folders.laplace(posteriors, base)
    with started(root, base) as (url, process):
        yield Running(url, base, base.path.name, mood, gang, root / "cache", process)


def test_each_particle_is_within_the_tolerance(half: Running) -> None:
    tokenizer = base_models.load_tokenizer(half.base)
    answers = [tokenizer.encode(answer)[0] for answer in folders.TASK.answers or ()]
    inputs = [{"text": text} for text in TEXTS]
    data = half.predict(model="gang", inputs=inputs, per_particle=True)["data"]
    reference = Reference(half.base, [half.gang.path / f"particles/{k:03d}" for k in range(PARTICLES)])
    differences = []
    for row, item in zip(inputs, data, strict=True):
        log_p = reference.log_p(folders.TASK.prompt_ids(tokenizer, row), [])[0, :, answers]
        served = torch.tensor(item["per_particle"], dtype=torch.float64)
        assert torch.allclose(served, log_p.softmax(1), atol=TOLERANCE), (served, log_p.softmax(1))
        differences.append(float((served - log_p.softmax(1)).abs().max()))
    assert max(differences) > 1e-3, "this is bfloat16 indeed"


def status(url: str, **body: Any) -> int | None:
    with contextlib.suppress(httpx.TransportError):
        ask = partial(httpx.post, json=body) if body else httpx.get
        return ask(url, headers=KEYED, timeout=60).status_code
    return None


def wait_until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_losses(half: Running, root: Path) -> None:
    """The last test of this server."""
    url, process = half.url, half.process
    said = (root / "log").read_text()
    assert re.search(r"posterior: warning: bad is not served: .*expected target modules.*query.*", said)
    names = [card["id"] for card in httpx.get(f"{url}/v1/models", headers=KEYED).json()["data"]]
    assert names[1:] == ["gang", "gang/map", "mood", "mood/map"], "the rest is served"
    assert half.metrics()["posterior_refused"] == 1

    children = psutil.Process(process.pid).children(recursive=True)
    (core,) = [child for child in children if "EngineCore" in child.name() or "EngineCore" in " ".join(child.cmdline())]
    (worker,) = [child for child in children if child.pid != core.pid and child.memory_info().rss > 2**28]
    worker.kill()
    wait_until(lambda: status(f"{url}/ready") == 503, 10)
    assert status(f"{url}/v1/predictive", model="mood", **ASK) == 503
    assert status(f"{url}/v1/predictive", model="mood", predictive="mixture", **ASK) == 200
    wait_until(lambda: status(f"{url}/ready") == 200, 120)
    assert status(f"{url}/v1/predictive", model="mood", **ASK) == 200
    assert half.metrics()["posterior_linearized_restarts_total"] == 1

    children = psutil.Process(process.pid).children(recursive=True)
    answers: dict[bool, httpx.Response] = {}

    def write(stream: bool) -> None:
        body = {"model": "mood", "prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": stream}
        answers[stream] = httpx.post(f"{url}/v1/completions", json=body, headers=KEYED, timeout=60)

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
    assert process.wait(30) == 2 and time.monotonic() - killed < 30
    assert (root / "log").read_text().strip().splitlines()[-1].startswith("posterior: the engine has stopped")
    assert not psutil.wait_procs(children, timeout=10)[1], "no process is left behind"
