"""The worker process that tells meanings apart, with small real models."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from posterior.meaning.embedding import Embedding
from posterior.meaning.nli import Nli
from server.errors import Refused, Unavailable
from server.metrics import Metrics
from server.workers.comparer import Comparer, identified
from tests.posterior.meaning import tiny
from tests.server.workers import weightless

TEXTS = [f"{word} {number}" for word in ("in Paris", "London", "a town") for number in range(14)]
QUESTION, THRESHOLD = "Where is it?", 0.99  # random vectors are near each other


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def light(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> Iterator[Comparer]:
    """With a worker that holds no models."""
    monkeypatch.setattr("server.workers.comparing.load", weightless.load_nothing)
    monkeypatch.setattr("server.workers.comparing.same", weightless.same)
    comparer = Comparer({"nli": Path("/nowhere")}, THRESHOLD, metrics)
    yield comparer
    comparer.stop()


@pytest.mark.asyncio
async def test_says_what_its_models_say(tmp_path: Path, metrics: Metrics) -> None:
    nli, embedding = tiny.classifier(tmp_path / "nli"), tiny.encoder(tmp_path / "embedding")
    comparer = Comparer({"nli": nli, "embedding": embedding}, THRESHOLD, metrics)
    try:
        with pytest.raises(Unavailable, match="comparison of meanings is being loaded; try .*, or .* 'exact'"):
            await comparer.same("nli", "", "a", ["b"])
        await asyncio.wait_for(comparer.start(), 60)
        first, *others = TEXTS
        both = await asyncio.gather(*(comparer.same(name, QUESTION, first, others) for name in ("nli", "embedding")))
        assert both == [model(QUESTION, first, others) for model in (Nli(nli), Embedding(embedding, THRESHOLD))]
        assert 0 < sum(both[0]) < len(others) and 0 < sum(both[1]) < len(others)
        with pytest.raises(Refused, match="a text has 65 tokens; .* reads 64 tokens") as caught:
            await comparer.same("embedding", "", "a" * 63, ["b"])
        assert caught.value.param == "uncertainty.meaning"
        assert len(await comparer.same("embedding", "", "a", ["b"])) == 1, "the worker lives on"
    finally:
        comparer.stop()
    await asyncio.wait_for(asyncio.to_thread(comparer._worker.process.join), 10)


@pytest.mark.asyncio
async def test_survives_the_loss_of_its_worker(light: Comparer, metrics: Metrics) -> None:
    await light.start()
    assert await light.same("nli", "", "a", ["a", "b"]) == [True, False]
    with pytest.raises(Unavailable, match="comparison of meanings was interrupted and is starting again"):
        await asyncio.wait_for(light.same("nli", "", str(weightless.KILLER), ["a"]), 60)
    for _ in range(600):
        await asyncio.sleep(0.05)
        if metrics.registry.get_sample_value("posterior_meaning_restarts_total") == 1 and light._worker.problem is None:
            break
    light.check()
    assert await light.same("nli", "", "a", ["a", "b"]) == [True, False]


@pytest.mark.asyncio
async def test_a_full_queue_refuses_at_once(light: Comparer, monkeypatch: pytest.MonkeyPatch) -> None:
    await light.start()
    monkeypatch.setattr("server.workers.comparer.MAX_WAITING", 2)
    found = await asyncio.gather(*(light.same("nli", "", "a", ["a"]) for _ in range(3)), return_exceptions=True)
    assert found[:2] == [[True], [True]] and isinstance(found[2], Unavailable) and "already wait" in str(found[2])
    assert await light.same("nli", "", "a", ["a"]) == [True]


def test_a_model_is_known_by_what_it_holds(tmp_path: Path) -> None:
    one, other = tiny.classifier(tmp_path / "one"), tiny.classifier(tmp_path / "other")
    assert identified("nli", one, "") == identified("nli", other, "") != identified("nli", one, "0.7")
    (other / "model.safetensors").write_bytes((one / "model.safetensors").read_bytes()[:-1] + b"\1")
    assert identified("nli", one, "") != identified("nli", other, "")
