"""vLLM's LoRA products on CPU, replaced from outside, in the process that runs the model.

`PunicaWrapperCPU` copies the adapter's matrices once for every token, in every layer, whether or not an adapter touches
it, and gives a token without adapter (slot -1) the last slot's. Here

- a layer that no adapter of the batch touches is skipped. Its slots are scanned for non-zero weights once after each
  write, which the tensors' own version counters tell, not in every step;
- the rows of a batch are cut, once a step, into blocks [blocks, size] of one adapter each, padded to the smallest size
  that needs no more than two blocks an adapter. Batched products then serve all blocks, one for the A of all slices
  and one for each slice's B, x [blocks, size, inputs] @ A.T [blocks, inputs, ranks] @ B.T [blocks, rank, outputs]: no
  row meets the weights of another's adapter, and unused slots cost nothing;
- blocks at even distances, such as those of gangs that decode, are views of the batch's rows, which are not copied;
- all is computed in float32 and rounded once, when it is added to the layer's output. The blocks' weights in float32
  are kept: the next step of a batch that decodes needs the same ones;
- a small batch's products are computed by one thread: a second one would wake up after they are done.

To torch.compile, a layer's LoRA is one opaque operator.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

ONE_THREAD = 2**17  # elements of a layer's input, at most: some 20 us of work, where waking a thread takes 50 to 100
T = TypeVar("T")


def remembered(tensor: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """`make()`, a function of the contents of `tensor` and of `key`, computed again only after a write to `tensor`."""
    at = (tensor._version, key)
    known: tuple[tuple[int, Hashable], T] | None = tensor.__dict__.get("_posterior_memo")
    if known is None or known[0] != at:
        known = tensor.__dict__["_posterior_memo"] = (at, make())
    return known[1]


@dataclass(frozen=True)
class Blocks:
    """The rows of a batch that have an adapter, in blocks of one adapter each.

    `slots` [blocks] are the blocks' adapters, `source` [blocks * size] the row at each place (padding repeats the
    block's first), `rows` and `places` [n] each row with an adapter, in ascending order, and its place. `all_rows`:
    every row has an adapter. `steps` (a, b): row a i + b j is place j of block i, for all rows; None: it is not so.
    """

    slots: tuple[int, ...]
    size: int
    source: Tensor
    rows: Tensor
    places: Tensor
    all_rows: bool
    steps: tuple[int, int] | None

    @classmethod
    def of(cls, slot_of_row: Sequence[int]) -> Blocks:
        """The blocks of a batch whose rows have these slots; -1: no adapter."""
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
            all_rows=len(rows) == len(slot_of_row),
            steps=_steps(source, size, len(slot_of_row)),
        )

    def gather(self, x: Tensor) -> Tensor:
        """`x` [rows, inputs] as float32 [blocks, size, inputs]."""
        if self.steps:
            return self._view(x.float())
        return x.index_select(0, self.source).float().view(len(self.slots), self.size, -1)

    def add(self, y: Tensor, shrunk: Tensor, up: Tensor) -> None:
        """Add `shrunk` [blocks, size, rank] times `up` [blocks, rank, outputs], both float32, to `y` [rows, outputs],
        rounding once."""
        if self.steps:
            places = self._view(y)
            places.copy_(torch.baddbmm(places.float(), shrunk, up))
            return
        update = torch.bmm(shrunk, up).flatten(0, 1).index_select(0, self.places)
        if self.all_rows:
            y.add_(update)
        else:
            y.index_copy_(0, self.rows, (y.index_select(0, self.rows) + update).to(y.dtype))

    def _view(self, x: Tensor) -> Tensor:
        """`x` [rows, width] itself as [blocks, size, width]."""
        assert self.steps is not None
        a, b = self.steps
        row, column = x.stride()
        return x.as_strided((len(self.slots), self.size, x.shape[1]), (a * row, b * row, column), x.storage_offset())


def _steps(source: Sequence[int], size: int, rows: int) -> tuple[int, int] | None:
    """`Blocks.steps`: rows sorted by adapter have them, as have gangs one after the other."""
    if len(source) != rows or not rows:
        return None
    a, b = (source[size] if size < rows else rows), (source[1] if size > 1 else 1)
    regular = all(row == a * (place // size) + b * (place % size) for place, row in enumerate(source))
    return (a, b) if regular else None


@dataclass
class Layer:
    """One layer's matrices [slots, 1, out, in], an A and a B for each slice of its outputs: which slots are not zero,
    and, as the products of the `slots` last asked for need them, A.T of all slices [blocks, inputs, ranks] and scale *
    B.T of each [blocks, rank, outputs] with its columns and its ranks; float32."""

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    widths: Sequence[int]
    scale: float
    adapted: list[frozenset[int]]
    slots: tuple[int, ...] = ()
    down: Tensor | None = None
    ups: list[tuple[slice, slice, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, a: Sequence[Tensor], b: Sequence[Tensor], widths: Sequence[int], scale: float) -> Layer:
        """The layer of these matrices, scanned for the slots that are not zero."""
        adapted = [frozenset(m.detach().flatten(1).any(1).nonzero().flatten().tolist()) for m in b]
        return cls([m.detach() for m in a], [m.detach() for m in b], widths, scale, adapted)

    def ask(self, slots: tuple[int, ...]) -> None:
        """Make `down` and `ups` those of these slots."""
        if slots == self.slots:
            return
        index, downs, end, ranks = list(slots), [], 0, 0
        self.slots, self.ups = slots, []
        for i, (b, width) in enumerate(zip(self.b, self.widths, strict=True)):
            end += width
            if self.adapted[i].isdisjoint(slots):
                continue
            up = self.scale * b[index].squeeze(1).float().transpose(1, 2).contiguous()
            first = ranks if self.a else 0  # an embedding's A is in its input already
            ranks = first + up.shape[1]
            self.ups.append((slice(end - width, end), slice(first, ranks), up))
            if self.a:
                downs.append(self.a[i][index].squeeze(1).float())
        # its long side stays last in memory, where products are fastest
        self.down = torch.cat(downs, 1).transpose(1, 2) if downs else None


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
    written = (scale, *(matrices._version for matrices in (*a, *b)))
    layer = remembered(b[0], written, lambda: Layer.of(a, b, widths, scale))
    layer.ask(blocks.slots)
    if layer.ups:
        gathered = blocks.gather(x)
        shrunk = gathered if layer.down is None else torch.bmm(gathered, layer.down)
        for columns, ranks, up in layer.ups:
            blocks.add(y[:, columns], shrunk[:, :, ranks], up)


def dispatch(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], widths: Sequence[int], slots: Tensor, scale: float
) -> None:
    """`add_lora`, as an operator where torch.compile would look inside; a plain call costs less."""
    add = torch.ops.vllm.posterior_add_lora if torch.compiler.is_compiling() else add_lora
    add(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), list(a), list(b), list(widths), slots, scale)


class Replaced(PunicaWrapperCPU):
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
    """Replace the products of this process's PunicaWrapperCPU, if it is a process on CPU."""
    if current_platform.is_cpu():
        if not hasattr(torch.ops.vllm, "posterior_add_lora"):  # an operator can be registered only once
            direct_register_custom_op("posterior_add_lora", add_lora, ["y"], lambda *_: None)
        for name in ("add_lora_linear", "add_lora_embedding", "add_lora_logits"):
            setattr(PunicaWrapperCPU, name, Replaced.__dict__[name])
