"""The last hidden state of a prompt: what the LM head reads where an answer begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from posterior.data.examples import ROWS, TOKENS, Examples, batches

NOTHING = ((0,), (1,))  # candidates of one token each: a row is the prompt alone, and ends with it


@torch.no_grad()
def last_states(model: Any, examples: Examples, batch_size: int = ROWS) -> Tensor:
    """The state [N, D] (float32, CPU) that the LM head reads at each prompt's last token, under the active adapter."""
    prompts = replace(examples, rows=[replace(row, continuations=NOTHING, label=0) for row in examples])
    found: dict[int, Tensor] = {}
    read: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _head, hidden: read.append(hidden[0]))
    try:
        parts = list(batches(prompts, batch_size, tokens=TOKENS))
        for indices, batch in tqdm(parts, desc="reading prompts", unit="batch", leave=False):
            batch = batch.to(next(model.parameters()).device)
            model(
                input_ids=batch.tokens,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
                logits_to_keep=1,
            )
            found.update(zip(indices, read.pop()[:, -1].float().cpu(), strict=True))
    finally:
        hook.remove()
    return torch.stack([found[index] for index in range(len(examples))])
