"""Where models run, as the user and the machine have it."""

from __future__ import annotations

import pytest
import torch

from posterior.errors import PosteriorError
from server.main import checked_device, checked_linearized
from server.workers import inside, memory


def test_the_linearised_predictive_is_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert {where: checked_linearized(where, "cuda") for where in ("auto", "off", "cpu", "cuda:1")} == {
        "auto": "cuda", "off": None, "cpu": "cpu", "cuda:1": "cuda:1",
    }  # fmt: skip
    assert checked_linearized("auto", "cpu") == "cpu"
    with pytest.raises(PosteriorError, match=r"^--linearized cuda:2: torch sees 2 GPUs here; use --linearized cpu$"):
        checked_linearized("cuda:2", "cpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checked_device("auto") == checked_device("cpu") == "cpu"
    with pytest.raises(PosteriorError, match="torch sees no GPU"):
        checked_device("cuda")


def test_float32_is_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checked_device("auto", "bfloat16") == "cuda" and checked_device("cpu", "float32") == "cpu"
    with pytest.raises(PosteriorError, match=r"^--dtype float32: .* bfloat16 or float16"):
        checked_device("auto", "float32")


def test_a_worker_beside_vllm_takes_half_of_what_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 100 bytes with 90 free, 70 of which vLLM will take: 20 are left."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (90, 100))
    assert memory.free("cuda:0", 0.7) == pytest.approx(20) and memory.free("cuda:0") == 90
    assert memory.free("cuda:0", 0.95) == 0
    limits: list[tuple[float, str]] = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *found: limits.append(found))
    inside.limit("cuda:0", 10)
    assert limits == [(0.2, "cuda:0")]
