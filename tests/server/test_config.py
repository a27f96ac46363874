"""The engine's command line."""

from __future__ import annotations

import pytest

from server.engine.config import lora_targets


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
