"""The worker process of the linearised predictive, with a tiny real model."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posterior.artefact import Posterior
from posterior.base import Base
from posterior.linearized import LinearizedModel
from server.errors import ApiError
from server.linearized import Linearizer
from server.metrics import Metrics
from tests.server import folders

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
    linearizer = Linearizer(base, {"mood": posterior.path}, "cpu", metrics)
    yield linearizer
    linearizer.stop()


def worker(linearizer: Linearizer) -> int:
    (pid,) = linearizer._pool._processes
    return int(pid)


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
    os.kill(worker(linearizer), signal.SIGKILL)
    with pytest.raises(ApiError) as caught:
        await asyncio.wait_for(lost, 60)
    assert caught.value.status == 503 and "\n" not in caught.value.message
    await asyncio.wait_for(check(), 60)


@pytest.mark.asyncio
async def test_a_full_queue_refuses_at_once(linearizer: Linearizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.linearized.MAX_WAITING", 2)
    with pytest.raises(ApiError, match="already wait") as refusal:
        await linearizer.moments("mood", PROMPTS, CANDIDATES)
    assert refusal.value.status == 503 and linearizer._waiting == []
    assert len(await linearizer.moments("mood", PROMPTS[:2], CANDIDATES)) == 2


@pytest.mark.asyncio
async def test_a_worker_that_cannot_load_says_why(
    tiny: tuple[Base, Posterior], metrics: Metrics, tmp_path: Path
) -> None:
    from posterior.errors import PosteriorError

    broken = Linearizer(tiny[0], {"mood": tmp_path}, "cpu", metrics)
    with pytest.raises(PosteriorError, match="posterior.json"):
        await broken.start()
    broken.stop()
