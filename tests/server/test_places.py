"""Where models run, as the user and the machine have it."""

from __future__ import annotations

import pytest
import torch

from posterior.errors import PosteriorError
from server.main import checked_device, checked_linearized


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
