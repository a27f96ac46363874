"""vLLM 0.32.0's LoRA products on CPU, replaced from outside, in the process that runs the model.

`PunicaWrapperCPU` copies the adapter's matrices once for every token, in every layer, whether or not an adapter touches
it, and gives a token without adapter (slot -1) the last slot's. Here

- a layer that no adapter of the batch touches is skipped. Its slots are scanned for non-zero weights once after each
  write, which the tensors' own version counters tell, not in every step;
- the rows of a batch are cut, once a step, into blocks [blocks, size] of one adapter each, padded to the smallest size
  that needs no more than two blocks an adapter. Two batched products then serve all blocks,
  x [blocks, size, inputs] @ A.T [blocks, inputs, rank] @ B.T [blocks, rank, outputs]: no row meets the weights of
  another's adapter, and unused slots cost nothing;
- both are computed in float32 and rounded once, when they are added to the layer's output. The blocks' weights in
  float32 are kept: the next step of a batch that decodes needs the same ones;
- a small batch's products are computed by one thread: a second one would wake up after they are done.

To torch.compile, a layer's LoRA is one opaque operator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import vllm
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

MENDED_VERSION = "0.32.0"
ONE_THREAD = 2**17  # elements of a layer's input, at most: some 20 us of work, where waking a thread takes 50 to 100
logger = logging.getLogger("posterior.server")
T = TypeVar("T")


def remembered(tensor: Tensor, key: int, make: Callable[[], T]) -> T:
    """`make()`, a function of the contents of `tensor` and of `key`, computed again only after a write to `tensor`."""
    at = (tensor._version, key)
    known: tuple[tuple[int, int], T] | None = tensor.__dict__.get("_posterior_memo")
    if known is None or known[0] != at:
        known = tensor.__dict__["_posterior_memo"] = (at, make())
    return known[1]


@dataclass(frozen=True)
class Blocks:
    """The rows of a batch that have an adapter, in blocks of one adapter each.

    `slots` [blocks] are the blocks' adapters, `source` [blocks * size] the row at each place (padding repeats the
    block's first), `rows` and `places` [n] each row with an adapter, in ascending order, and its place. `in_order`:
    place i holds row i; `all_rows`: every row has an adapter.
    """

    slots: tuple[int, ...]
    size: int
    source: Tensor
    rows: Tensor
    places: Tensor
    in_order: bool
    all_rows: bool

    @classmethod
    def of(cls, slot_of_row: Sequence[int]) -> Blocks:
        by_slot: dict[int, list[int]] = {}
        for row, slot in enumerate(slot_of_row):
            if slot >= 0:
                by_slot.setdefault(slot, []).append(row)
        size = -(-sum(map(len, by_slot.values())) // max(len(by_slot), 1))
        cut = [(slot, rows[i : i + size]) for slot, rows in by_slot.items() for i in range(0, len(rows), size)]
        source = [row for _, rows in cut for row in rows + rows[:1] * (size - len(rows))]
        place = {row: size * i + j for i, (_, rows) in enumerate(cut) for j, row in enumerate(rows)}
        rows = sorted(place)
        return cls(
            slots=tuple(slot for slot, _ in cut),
            size=size,
            source=torch.tensor(source, dtype=torch.long),
            rows=torch.tensor(rows, dtype=torch.long),
            places=torch.tensor([place[row] for row in rows], dtype=torch.long),
            in_order=source == list(range(len(slot_of_row))),
            all_rows=len(rows) == len(slot_of_row),
        )

    def gather(self, x: Tensor) -> Tensor:
        """`x` [rows, inputs] as float32 [blocks, size, inputs]."""
        x = x if self.in_order else x.index_select(0, self.source)
        return x.float().view(len(self.slots), self.size, -1)

    def add(self, update: Tensor, y: Tensor) -> None:
        """Add float32 `update` [blocks, size, outputs] to `y` [rows, outputs]."""
        update = update.flatten(0, 1)
        if not self.in_order:
            update = update.index_select(0, self.places)
        if self.all_rows:
            y.add_(update)
        else:
            y.index_copy_(0, self.rows, (y.index_select(0, self.rows) + update).to(y.dtype))


@dataclass
class Stack:
    """One layer's matrices [slots, 1, out, in]: the slots not zero, and those last asked for as [blocks, in, out]."""

    matrices: Tensor
    adapted: frozenset[int]
    slots: tuple[int, ...] = ()
    transposed: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, matrices: Tensor) -> Stack:
        adapted = matrices.detach().flatten(1).any(1).nonzero().flatten().tolist()
        return cls(matrices.detach(), frozenset(adapted))

    def __getitem__(self, slots: tuple[int, ...]) -> Tensor:
        if slots != self.slots:
            transposed = self.matrices[list(slots)].squeeze(1).float().transpose(1, 2)
            narrow = transposed.shape[2] < transposed.shape[1]  # products are fastest with the long side last in memory
            self.slots, self.transposed = slots, transposed if narrow else transposed.contiguous()
        return self.transposed


def stack(matrices: Tensor) -> Stack:
    return remembered(matrices, 0, lambda: Stack.of(matrices))


def add_lora(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], widths: list[int], slot_of_row: Tensor, scale: float
) -> None:
    """Add scale * x A.T B.T to `y` [rows, outputs], each A and B to its slice of the outputs; without A, x B.T."""
    threads = torch.get_num_threads()
    set_num_threads = torch._C.set_num_threads  # vLLM puts a warning in the place of torch.set_num_threads
    set_num_threads(1 if x.numel() <= ONE_THREAD else threads)
    try:
        _add_lora(y, x, a, b, widths, slot_of_row, scale)
    finally:
        set_num_threads(threads)


def _add_lora(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], widths: list[int], slot_of_row: Tensor, scale: float
) -> None:
    blocks = remembered(slot_of_row, len(x), lambda: Blocks.of(slot_of_row[: len(x)].tolist()))
    gathered, end = None, 0
    for i, (b_matrices, width) in enumerate(zip(b, widths, strict=True)):
        end += width
        b_stack = stack(b_matrices)
        if b_stack.adapted.isdisjoint(blocks.slots):
            continue
        gathered = blocks.gather(x) if gathered is None else gathered
        shrunk = torch.bmm(gathered, stack(a[i])[blocks.slots]) if a else gathered
        update = torch.bmm(shrunk, b_stack[blocks.slots])
        blocks.add(update if scale == 1 else scale * update, y[:, end - width : end])


def dispatch(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], widths: Sequence[int], slots: Tensor, scale: float
) -> None:
    """`add_lora`, as an operator where torch.compile would look inside; a plain call costs less."""
    add = torch.ops.vllm.posterior_add_lora if torch.compiler.is_compiling() else add_lora
    add(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), list(a), list(b), list(widths), slots, scale)


class Mended(PunicaWrapperCPU):
    """The methods that replace those of PunicaWrapperCPU; arguments as there, `buffer` being scratch we do not need."""

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        dispatch(y, x, lora_a_stacked, lora_b_stacked, output_slices, self._token_lora_indices, scale)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        dispatch(y, x, (), (lora_b_stacked,), lora_b_stacked.shape[-2:-1], self._token_lora_indices, 1.0)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        # prompt_logprobs asks for rows of one prompt, and nothing says whose: as on GPU, they go without (issue 51594)
        if len(x) == self.indices_len[1]:
            widths = lora_b_stacked.shape[-2:-1]
            dispatch(y, x, (lora_a_stacked,), (lora_b_stacked,), widths, self._sampler_indices, scale)


def install() -> None:
    """Replace the products of this process's PunicaWrapperCPU, if it is a process on CPU and the version we know."""
    if vllm.__version__ != MENDED_VERSION:
        logger.warning("vLLM %s is not %s: its LoRA on CPU is left as it is", vllm.__version__, MENDED_VERSION)
    elif current_platform.is_cpu():
        if not hasattr(torch.ops.vllm, "posterior_add_lora"):  # an operator can be registered only once
            direct_register_custom_op("posterior_add_lora", add_lora, ["y"], lambda *_: None)
        for name in ("add_lora_linear", "add_lora_embedding", "add_lora_logits"):
            setattr(PunicaWrapperCPU, name, Mended.__dict__[name])
