"""Memory of the moments: counted from two short passes, and heeded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posterior.data.examples import Example
from posterior.laplace import linearized
from posterior.laplace.linearized import LinearizedModel
from posterior.likelihood.footprint import MARGIN, Footprint, _kept, measure
from posterior.models import lora
from posterior.models.base import resolve
from tests.posterior.conftest import tiny_llama


def attached(attention: str) -> Any:
    model = tiny_llama()
    model.set_attn_implementation(attention)
    return lora.attach(model, rank=2, seed=1).eval().requires_grad_(False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_two_short_passes_foretell_a_long_one(attention: str) -> None:
    model = attached(attention)
    found = measure(model, lora.matrices(model), "cpu")
    assert found.token > 0 and found.jacobian == 4 * sum(value.numel() for value in lora.get(model).values())
    assert (found.square > 2 * 2) == (attention == "eager"), "two layers of two heads keep each pair"
    for length in (8, 250):
        kept = _kept(model, lora.matrices(model), length, "cpu")
        assert kept == pytest.approx(length * (found.token + found.square * length), rel=0.02)


def test_what_an_example_takes() -> None:
    footprint = Footprint(token=10, square=1, jacobian=100, words=1000, branch=20)
    prompt = (0,) * 6
    assert footprint.bytes(Example(prompt, ((1,), (2,), (3,)), 0)) == MARGIN * (6 * (10 + 6) + 2 * 100)
    several = Example(prompt, ((1, 2), (3,), (4, 5)), 0)
    assert footprint.bytes(several) == MARGIN * (11 * (10 + 11) + 2 * 100 + 5 * 1000), "side by side"
    alone = replace(footprint, branch=10)
    assert alone.bytes(several) == MARGIN * (3 * 8 * (10 + 8) + 2 * 100 + 5 * 1000), "a row for each"


@pytest.mark.parametrize("candidates", [((1,), (2,)), ((1, 2), (3,))])
def test_the_longest_prompt_is_the_last_that_fits(candidates: tuple[tuple[int, ...], ...]) -> None:
    footprint = Footprint(token=10, square=0.1, jacobian=100, words=50, branch=30)
    for room in (1e3, 1e4, 1e5):
        longest = footprint.longest(candidates, room)
        takes = [footprint.bytes(Example((0,) * length, candidates, 0)) for length in (longest, longest + 1)]
        assert takes[0] <= room < takes[1]
    assert footprint.longest(candidates, 1.0) == 0


@pytest.fixture
def model(tiny_base: Path, run_fit: Any) -> LinearizedModel:
    return LinearizedModel(resolve(str(tiny_base)), {"tiny": run_fit()})


PROMPTS, CANDIDATES = [[5 + i] * (3 + i) for i in range(5)], ((60,), (61,), (62,))


def test_batches_are_halved_until_they_fit(model: LinearizedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """For lack of room by the estimate, or for lack of memory; the numbers are the same."""
    expected = model.logits("tiny", PROMPTS, [CANDIDATES] * 5)
    sizes: list[int] = []
    original = linearized.moments

    def moments(network: Any, matrices: Any, law: Any, batch: Any) -> Any:
        sizes.append(len(batch.label))
        if len(batch.label) > limit:
            raise error
        return original(network, matrices, law, batch)

    monkeypatch.setattr(linearized, "moments", moments)

    def check(room: float) -> None:
        for found, wanted in zip(model.logits("tiny", PROMPTS, [CANDIDATES] * 5, room), expected, strict=True):
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    limit, error = 32, RuntimeError("unused")
    check(2 * model.footprints["tiny"].bytes(Example((0,) * 7, CANDIDATES, 0)))
    assert max(sizes) <= 3 and sum(sizes) == 5
    for lack in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"),
    ):
        sizes.clear()
        limit, error = 1, lack
        check(float("inf"))
        assert sizes[0] == 5 and sizes.count(1) == 5
    limit = 0
    with pytest.raises(MemoryError, match="no memory for the moments of"):
        model.logits("tiny", PROMPTS, [CANDIDATES] * 5)
    error = RuntimeError("another fault")
    with pytest.raises(RuntimeError, match="another fault"):
        model.logits("tiny", PROMPTS, [CANDIDATES] * 5)
