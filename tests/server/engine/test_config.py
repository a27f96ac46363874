"""The engine's command line."""

from __future__ import annotations

import os

from server.engine.config import lora_targets, set_environment


def test_only_the_layers_that_an_adapter_changes_get_lora():
    modules = ["model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    assert lora_targets([*modules, modules[0]]) == ("down_proj", "q_proj", "v_proj")


def test_freed_tensors_are_kept_on_a_cpu_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "environ", {"MALLOC_TRIM_THRESHOLD_": "4096"})
    set_environment("cpu")
    assert os.environ["MALLOC_MMAP_THRESHOLD_"] == "1073741824" and os.environ["MALLOC_TRIM_THRESHOLD_"] == "4096"
    monkeypatch.setattr(os, "environ", {})
    set_environment("cuda")
    assert not [name for name in os.environ if name.startswith("MALLOC")]
