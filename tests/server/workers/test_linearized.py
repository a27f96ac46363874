"""The worker process of the linearised predictive, with a tiny real model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posterior.errors import PosteriorError
from posterior.laplace.linearized import LinearizedModel
from posterior.likelihood.footprint import MARGIN, Footprint
from posterior.models.base import Base
from posterior.storage.artefact import Posterior
from server.errors import Refused, RequestError, Unavailable
from server.metrics import Metrics
from server.workers import inside
from server.workers.inside import _readable, _unchanged
from server.workers.linearized import SHARE, Linearizer
from tests.server import folders
from tests.server.workers import weightless

CANDIDATES = ((3,), (5,), (7,))
PROMPTS = [[1, 2, 9], [4, 4, 8, 6], [11, 12]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Posterior]:
    root = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "base")
    base = Base(root / "base", "tiny", None, "sha256:00")
    return base, folders.laplace(root, base, precision=10.0)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def linearizer(tiny: tuple[Base, Posterior], metrics: Metrics) -> Iterator[Linearizer]:
    base, posterior = tiny
    linearizer = Linearizer(base, {"mood": (posterior.path, posterior.hash)}, "cpu", metrics)
    yield linearizer
    linearizer.stop()


@pytest.fixture
def light(metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Linearizer]:
    """With a worker that computes nothing."""
    for name, function in (
        ("inside.load", weightless.load),
        ("inside.moments", weightless.moments),
        ("memory.free", weightless.free),
    ):
        monkeypatch.setattr(f"server.workers.{name}", function)
    (tmp_path / "mood").mkdir()
    (tmp_path / "mood" / "posterior.json").touch()
    nowhere: Any = None  # a real base would bring torch into each worker
    linearizer = Linearizer(nowhere, {"mood": (tmp_path / "mood", "")}, "cpu", metrics)
    yield linearizer
    linearizer.stop()


def worker(linearizer: Linearizer) -> int:
    return int(linearizer._worker.process.pid or 0)


async def ready(linearizer: Linearizer) -> None:
    for _ in range(600):
        with contextlib.suppress(RequestError):
            linearizer.check()
            return
        await asyncio.sleep(0.1)
    linearizer.check()


async def refused(awaitable: Any, kind: type[RequestError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        await asyncio.wait_for(awaitable, 60)
    assert "\n" not in caught.value.message


def sample(metrics: Metrics, name: str) -> float:
    value = metrics.registry.get_sample_value(name)
    return 0.0 if value is None else value


@pytest.mark.asyncio
async def test_batches_and_survives_the_loss_of_its_worker(
    tiny: tuple[Base, Posterior], linearizer: Linearizer, metrics: Metrics
) -> None:
    await linearizer.start()
    base, posterior = tiny
    expected = LinearizedModel(base, {"mood": posterior}).logits("mood", PROMPTS, [CANDIDATES] * 3)

    async def check() -> None:
        got = await asyncio.gather(*(linearizer.moments("mood", [prompt], CANDIDATES) for prompt in PROMPTS))
        for ((mean, covariance),), (want_mean, want_covariance) in zip(got, expected, strict=True):
            assert torch.allclose(mean, want_mean, atol=1e-5) and torch.allclose(covariance, want_covariance, atol=1e-5)

    await check()
    assert sample(metrics, "posterior_linearized_batch_size_sum") == 3
    assert sample(metrics, "posterior_linearized_batch_size_count") == 1, "what arrives together runs together"

    lost = asyncio.create_task(linearizer.moments("mood", [[1] * 40] * 400, CANDIDATES))
    await asyncio.sleep(0.05)
    before = worker(linearizer)
    os.kill(before, signal.SIGKILL)
    await refused(lost, Unavailable, "linearised predictive")
    await refused(linearizer.moments("mood", [PROMPTS[0]], CANDIDATES), Unavailable, "starting again.*'mixture'")
    await ready(linearizer)
    assert worker(linearizer) != before and sample(metrics, "posterior_linearized_restarts_total") == 1
    await asyncio.wait_for(check(), 60)


@pytest.mark.long
@pytest.mark.asyncio
async def test_posteriors_come_and_go_and_a_new_worker_knows_which(
    tiny: tuple[Base, Posterior], linearizer: Linearizer, tmp_path: Path
) -> None:
    base, mood = tiny
    await linearizer.start()
    other = folders.laplace(tmp_path, base, precision=3.0, name="other", seed=3)

    async def check(name: str, posterior: Posterior) -> None:
        expected = LinearizedModel(base, {name: posterior}).logits(name, PROMPTS, [CANDIDATES] * 3)
        for (mean, covariance), want in zip(await linearizer.moments(name, PROMPTS, CANDIDATES), expected, strict=True):
            assert torch.allclose(mean, want[0], atol=1e-5) and torch.allclose(covariance, want[1], atol=1e-5)

    await linearizer.load("other", (other.path, other.hash))
    await check("other", other)
    await check("mood", mood)
    with pytest.raises(PosteriorError, match="has changed since the server loaded it"):
        await linearizer.load("third", (other.path, "sha256:another"))
    await linearizer.unload("mood")
    await check("other", other)
    os.kill(worker(linearizer), signal.SIGKILL)
    await asyncio.sleep(0.2)
    await ready(linearizer)
    await check("other", other)
    await linearizer.unload("other")
    await linearizer.load("mood", (mood.path, mood.hash))
    await check("mood", mood)


@pytest.mark.long
@pytest.mark.asyncio
async def test_a_signal_to_the_whole_group_leaves_the_worker_to_the_server(linearizer: Linearizer) -> None:
    """systemd sends SIGTERM to every process, a terminal SIGINT: the server then drains, and the worker must answer."""
    await linearizer.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker(linearizer), number)
    assert len(await linearizer.moments("mood", PROMPTS, CANDIDATES)) == len(PROMPTS)
    linearizer.stop()
    await asyncio.wait_for(asyncio.to_thread(linearizer._worker.process.join), 10)


@pytest.mark.asyncio
async def test_an_idle_worker_that_dies_is_noticed_and_loaded_again_when_that_is_possible(
    light: Linearizer, metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.workers.process.LONGEST_PAUSE", 0.2)
    await light.start()
    (tmp_path / "mood").rename(tmp_path / "away")
    os.kill(worker(light), signal.SIGKILL)
    for _ in range(600):
        await asyncio.sleep(0.05)
        if light._worker.problem == "cannot be loaded again":
            break
    await refused(light.moments("mood", PROMPTS, CANDIDATES), Unavailable, "cannot be loaded again.*'mixture'")
    (tmp_path / "away").rename(tmp_path / "mood")
    await ready(light)
    assert len(await light.moments("mood", PROMPTS, CANDIDATES)) == 3
    assert sample(metrics, "posterior_linearized_restarts_total") == 1


def test_a_posterior_that_cannot_be_read_is_left_out_alone(tiny: tuple[Base, Posterior], tmp_path: Path) -> None:
    _, posterior = tiny
    folder, gone = (posterior.path, posterior.hash), (tmp_path, "")
    posteriors, refused = _readable({"mood": folder, "gone": gone, "other": (posterior.path, "another hash")})
    assert list(posteriors) == ["mood"] and "posterior.json" in refused["gone"] and "changed" in refused["other"]
    with pytest.raises(PosteriorError, match=r"posterior\.json"):
        _readable({"gone": gone})


@pytest.mark.asyncio
async def test_what_a_worker_could_not_read_is_said_and_counted(
    light: Linearizer, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    base, folders, device = light._worker.parts
    light._worker.parts = (base, {**folders, "gone": (Path("/nowhere"), "")}, device)
    light._worker.begin()  # as after the loss of the first
    await light.start()
    light.check()
    assert len(await light.moments("mood", PROMPTS, CANDIDATES)) == 3
    await refused(light.moments("gone", PROMPTS, CANDIDATES), Unavailable, "of 'gone' could not be loaded; .*'mixture'")
    assert sample(metrics, "posterior_linearized_refused") == 1
    assert "the linearised predictive is without gone: " in caplog.text


@pytest.mark.asyncio
async def test_a_prompt_that_ends_two_workers_is_not_tried_a_third_time_and_the_others_are_answered(
    light: Linearizer, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    await light.start()

    def ask(prompt: list[int]) -> Any:
        return light.moments("mood", [prompt], CANDIDATES)

    guilty, innocent = [1, weightless.KILLER], [4, 4, 8]
    both = await asyncio.gather(ask(guilty), ask(innocent), return_exceptions=True)
    assert all(isinstance(error, Unavailable) for error in both)
    await ready(light)
    again = await asyncio.gather(ask(innocent), ask(guilty), return_exceptions=True)
    assert isinstance(again[0], list), "alone, it is answered"
    assert isinstance(again[1], Unavailable)
    await ready(light)
    await refused(ask(guilty), Refused, "prompt 0 has ended the .* worker 2 times.*'mixture'")
    assert len(await ask(innocent)) == 1
    assert sample(metrics, "posterior_linearized_restarts_total") == 2
    monkeypatch.setattr("server.workers.suspects.FORGIVEN_SECONDS", 0.0)
    assert light._suspects.strikes(("mood", tuple(guilty), CANDIDATES)) == 0


@pytest.mark.asyncio
async def test_a_prompt_that_memory_cannot_hold_is_refused_with_the_arithmetic(light: Linearizer) -> None:
    await light.start()
    assert light._room == SHARE * weightless.free("cpu")
    light._footprints = {"mood": Footprint(token=1e7, square=0, jacobian=0, words=0, branch=0)}
    light._room = 50 * MARGIN * 1e7
    assert len(await light.moments("mood", [[1] * 50], CANDIDATES)) == 1
    words = r"prompt 1 has 60 tokens: .* 3 answers takes 1.0 GB, and 0.8 GB are free .* at most 50 tokens, or .*mixture"
    await refused(light.moments("mood", [[1], [1] * 60], CANDIDATES), Refused, words)
    light._room = 1.0
    await refused(light.moments("mood", [[1]], CANDIDATES), Refused, "give fewer answers, or ask for")


def test_another_posterior_is_not_loaded_under_the_same_name(tiny: tuple[Base, Posterior]) -> None:
    _, posterior = tiny
    assert _unchanged(posterior.path, posterior.hash).hash == posterior.hash
    with pytest.raises(PosteriorError, match="has changed since the server loaded it"):
        _unchanged(posterior.path, "sha256:other")


def test_a_worker_does_not_live_on_after_an_error_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        device = "cpu"
        error: Exception = torch.AcceleratorError("illegal memory access")

        def logits(self, *_: Any) -> Any:
            raise self.error

    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("server.workers.inside._model", Model())
    monkeypatch.setattr("server.workers.inside.os._exit", end)
    with pytest.raises(SystemExit):
        inside.moments("mood", [(1,)], [CANDIDATES], 1.0)
    monkeypatch.setattr(Model, "error", RuntimeError("a fault of one batch"))
    with pytest.raises(RuntimeError, match="one batch"):
        inside.moments("mood", [(1,)], [CANDIDATES], 1.0)


@pytest.mark.asyncio
async def test_a_full_queue_refuses_at_once(light: Linearizer, monkeypatch: pytest.MonkeyPatch) -> None:
    await light.start()
    monkeypatch.setattr("server.workers.linearized.MAX_WAITING", 2)
    with pytest.raises(Unavailable, match="already wait"):
        await light.moments("mood", PROMPTS, CANDIDATES)
    assert light._waiting == []
    assert len(await light.moments("mood", PROMPTS[:2], CANDIDATES)) == 2


@pytest.mark.long
@pytest.mark.asyncio
async def test_a_worker_that_cannot_load_says_why(
    tiny: tuple[Base, Posterior], metrics: Metrics, tmp_path: Path
) -> None:
    broken = Linearizer(tiny[0], {"mood": (tmp_path, "")}, "cpu", metrics)
    with pytest.raises(PosteriorError, match="posterior.json"):
        await broken.start()
    broken.stop()
