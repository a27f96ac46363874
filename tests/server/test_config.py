"""The engine's command line."""

from __future__ import annotations

import os

import pytest

from server.engine.config import lora_targets, set_environment


@pytest.mark.parametrize(
    ("named", "targets"),
    [
        ([["v_proj", "q_proj"]], ("q_proj", "v_proj")),
        ([["q_proj"], ["self_attn.o_proj", "q_proj"]], ("o_proj", "q_proj")),
        ([["q_proj"], r".*\.(q|v)_proj"], None),
        ([["q_proj"], None], None),
    ],
)
def test_only_the_layers_that_an_adapter_changes_get_lora(named, targets):
    assert lora_targets({"r": 8, "target_modules": names} for names in named) == targets


def test_freed_tensors_are_kept_on_a_cpu_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "environ", {"MALLOC_TRIM_THRESHOLD_": "4096"})
    set_environment("cpu")
    assert os.environ["MALLOC_MMAP_THRESHOLD_"] == "1073741824" and os.environ["MALLOC_TRIM_THRESHOLD_"] == "4096"
    monkeypatch.setattr(os, "environ", {})
    set_environment("cuda")
    assert not [name for name in os.environ if name.startswith("MALLOC")]
