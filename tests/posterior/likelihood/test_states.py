"""The last hidden state of prompts, against transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posterior.data.examples import encode
from posterior.data.task import Task
from posterior.likelihood.states import last_states
from posterior.models.base import load_model, load_tokenizer, resolve

TASK = Task("choice", "{text}:", ("p", "n"))
TEXTS = ["good", "a much longer text of many words, and more", "bad thing", "x"]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_states_are_those_at_each_prompts_end(tiny_base: Path, batch_size: int) -> None:
    base = resolve(str(tiny_base))
    model = load_model(base, torch.float32, "cpu").eval()
    examples = encode(TASK, load_tokenizer(base), [{"text": text, "label": "p"} for text in TEXTS])
    hooks = len(model.get_output_embeddings()._forward_pre_hooks)
    found = last_states(model, examples, batch_size)
    for example, state in zip(examples, found, strict=True):
        with torch.no_grad():
            output = model(torch.tensor([example.prompt]), output_hidden_states=True)
        # float32 sums of another batch and of padded rows
        torch.testing.assert_close(state, output.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-5)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == hooks
