"""How much memory the moments of scores take (posterior/laplace/linearized.py), so that none is asked for that is not
there.

What a backward pass needs is kept from the forward pass: some tensors of each layer's width for every token, and with
plain ("eager") attention some of every pair of tokens. How many depends on the architecture, so two short passes count
them. Bytes = (token + square * length) * tokens of all rows, and for each backward pass its Jacobian; and for answers
of several tokens the log-probabilities of the whole vocabulary at each of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posterior.data.candidates import Candidates
from posterior.data.examples import Example, Examples, collate
from posterior.likelihood.directions import passes
from posterior.likelihood.scores import branching, record, scores

LENGTHS = (32, 96)  # tokens of the two passes
MARGIN = 1.6  # for what is alive for a moment only and the allocator's gaps: 1.3 measured for 2 answers, 1.8 for 16
WORDS = 4  # numbers kept of each word at a scored position: logits, log-probabilities, and the gradients of both


@dataclass(frozen=True)
class Footprint:
    """Bytes of one token, of one pair of a row's tokens, of one candidate's Jacobian, and of the vocabulary at one
    position; `branch`: the longest row in which an example's continuations stand side by side (0: each has a row)."""

    token: float
    square: float
    jacobian: float
    words: float
    branch: float

    def bytes(self, example: Example) -> float:
        """What the moments of one example take."""
        rows, length = example.sequences, example.length
        if example.single or example.row <= self.branch:
            rows, length = 1, example.row
        scored = 0 if example.single else sum(map(len, example.continuations))
        return MARGIN * (
            rows * length * (self.token + self.square * length)
            + passes(len(example.continuations)) * self.jacobian
            + scored * self.words
        )

    def longest(self, candidates: Candidates, room: float) -> int:
        """Tokens of the longest prompt whose moments take at most `room` bytes; 0 if there is none."""
        low, high = 0, 1
        while high < 2**24 and self.bytes(Example((0,) * high, candidates, 0)) <= room:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.bytes(Example((0,) * middle, candidates, 0)) <= room else (low, middle)
        return low


@torch.enable_grad()
def measure(model: Any, matrices: Mapping[str, nn.Linear], device: str) -> Footprint:
    """The footprint of moments over these matrices."""
    short, long = LENGTHS
    each = [_kept(model, matrices, length, device) / length for length in LENGTHS]
    square = max(0.0, (each[1] - each[0]) / (long - short))
    head: Tensor = model.get_output_embeddings().weight
    return Footprint(
        token=each[1] - square * long,
        square=square,
        jacobian=4.0 * sum(module.weight.numel() for module in matrices.values()),
        words=4.0 * WORDS * head.shape[0],
        branch=branching(model),
    )


def _kept(model: Any, matrices: Mapping[str, nn.Linear], length: int, device: str) -> int:
    """Bytes that are alive in a backward pass after a forward pass of `length` tokens, the model's own left out."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    batch = collate(Examples([Example((0,) * length, ((0,), (1,)), 0)])).to(device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), record(dict(matrices)) as tape:
        f = scores(model, batch)
    gradients = sum(value.nbytes for value in tape.outputs.values())
    for value in (*tape.inputs.values(), *tape.outputs.values()):
        keep(value)
    for value in (*model.parameters(), *model.buffers()):
        kept.pop(value.untyped_storage().data_ptr(), None)
    del f
    return gradients + sum(storage.nbytes() for storage in kept.values())
