"""The fault of vLLM's sampler that server/engine/compat/patch.py fixes: shown, and fixed, on vLLM's own class."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from posterior.errors import PosteriorError
from server.engine.config import set_environment

set_environment("cpu")  # before vLLM, as the server does

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: E402
from vllm.v1.sample.logits_processor import LogitsProcessors  # noqa: E402
from vllm.v1.sample.metadata import SamplingMetadata  # noqa: E402
from vllm.v1.sample.sampler import Sampler  # noqa: E402

from server.engine.compat import contract, patch  # noqa: E402

LOGITS = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))


def metadata(specific: dict[int, list[int]] | None, plain: int | None) -> SamplingMetadata:
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(SamplingMetadata)}
    fields |= {
        "all_greedy": True,
        "all_random": False,
        "no_penalties": True,
        "generators": {},
        "bad_words_token_ids": {},
    }
    fields |= {"output_token_ids": [[]] * 4, "logitsprocs": LogitsProcessors(), "max_num_logprobs": plain}
    return SamplingMetadata(**{**fields, "logprob_token_ids": specific})


def rows(forward: Any, specific: dict[int, list[int]] | None, plain: int | None) -> list[dict[int, float]]:
    """{token: log-probability} of each row, padding left out."""
    tensors = forward(Sampler(), LOGITS.clone(), metadata(specific, plain)).logprobs_tensors
    pairs = zip(tensors.logprob_token_ids.tolist(), tensors.logprobs.tolist(), strict=True)
    return [{t: p for t, p in zip(ids, values, strict=True) if p > float("-inf")} for ids, values in pairs]


def test_stock_sampler_drops_plain_rows_and_the_fixed_one_does_not() -> None:
    stock = Sampler.forward.__wrapped__  # type: ignore[attr-defined]
    specific = {1: [3, 4], 3: [7]}
    expected = rows(stock, None, 5)
    assert len(rows(stock, specific, 5)[0]) == 1, "vLLM fixed this itself: remove server/engine/compat/patch.py"
    fixed = rows(Sampler.forward, specific, 5)
    assert fixed[0] == pytest.approx(expected[0]) and fixed[2] == pytest.approx(expected[2])
    logprobs = LOGITS.log_softmax(-1)
    assert {3, 4} <= fixed[1].keys() and fixed[1][3] == pytest.approx(float(logprobs[1, 3]), abs=1e-6)
    assert fixed[3][7] == pytest.approx(float(logprobs[3, 7]), abs=1e-6)
    assert specific == {1: [3, 4], 3: [7]}, "the batch's own table is left alone"


@pytest.mark.parametrize(("specific", "plain"), [({0: [1]}, None), (None, 3), ({0: [1]}, 0)])
def test_other_batches_are_untouched(specific: dict[int, list[int]] | None, plain: int | None) -> None:
    stock = Sampler.forward.__wrapped__  # type: ignore[attr-defined]
    assert rows(Sampler.forward, specific, plain) == rows(stock, specific, plain)


def test_nothing_is_changed_in_a_version_that_was_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    before, products = Sampler.forward, PunicaWrapperCPU.add_lora_linear
    monkeypatch.setattr(contract, "installed", lambda: "9.9.9")
    with pytest.raises(PosteriorError, match=r"vLLM 9\.9\.9 was not tested"):
        patch.install()
    assert Sampler.forward is before and PunicaWrapperCPU.add_lora_linear is products
