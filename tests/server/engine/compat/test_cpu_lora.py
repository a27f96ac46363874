"""vLLM's LoRA layers on CPU with the products of server/engine/compat/cpu_lora.py, against a loop over tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from server.engine.config import set_environment

set_environment("cpu")  # before vLLM, as the server does

from vllm.config.lora import LoRAConfig  # noqa: E402
from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.lora.layers.column_parallel_linear import MergedQKVParallelLinearWithLoRA  # noqa: E402
from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA  # noqa: E402
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA  # noqa: E402
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: E402

from server.engine.compat import cpu_lora  # noqa: E402

SLOTS, RANK, INPUTS, WIDTHS, VOCAB = 5, 8, 24, (24, 8, 8), 50
METHODS = ("add_lora_linear", "add_lora_embedding", "add_lora_logits")


def stock_methods() -> dict[str, Any]:
    """Of vLLM's module read once more, whoever has installed ours before."""
    spec = importlib.util.find_spec(PunicaWrapperCPU.__module__)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: module.PunicaWrapperCPU.__dict__[name] for name in METHODS}


STOCK = stock_methods()

Pair = tuple[Tensor, Tensor]  # A [rank, inputs], B [outputs, rank]
Adapters = dict[int, list[Pair | None]]  # by slot: one pair, or none, for each slice of the outputs


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use_stock(monkeypatch)  # which puts back, afterwards, what was there
    cpu_lora.install()
    with torch.no_grad():
        yield


def use_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in STOCK.items():
        monkeypatch.setattr(PunicaWrapperCPU, name, method)


def wrapper(slot_of_row: Sequence[int], sampled: Sequence[int] | None = None) -> PunicaWrapperCPU:
    """As the runner leaves it for one step: adapter number slot + 1 lies in each slot."""
    result = PunicaWrapperCPU(256, 256, "cpu")
    route(result, slot_of_row, sampled)
    return result


def route(punica: PunicaWrapperCPU, slot_of_row: Sequence[int], sampled: Sequence[int] | None = None) -> None:
    ids = [tuple(slot + 1 for slot in slots) for slots in (slot_of_row, sampled or slot_of_row)]
    punica.update_metadata(LoRAMapping(*ids, is_prefill=True), [i + 1 for i in range(SLOTS)], SLOTS + 1, VOCAB)


def qkv(punica: PunicaWrapperCPU, adapters: Adapters, dtype: torch.dtype = torch.float32) -> Any:
    """vLLM's layer, with its own slots and its own way to fill them, around no base layer."""
    layer = bare(MergedQKVParallelLinearWithLoRA, punica, dtype)
    layer.n_slices, layer.output_slices, layer.input_size, layer.tp_size = 3, WIDTHS, INPUTS, 1
    layer.create_lora_weights(SLOTS, layer.lora_config)
    for slot, pairs in adapters.items():
        load(layer, slot, pairs)
    return layer


def bare(kind: type[Any], punica: PunicaWrapperCPU, dtype: torch.dtype) -> Any:
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.device, layer.punica_wrapper = torch.device("cpu"), punica
    layer.lora_config = LoRAConfig(max_lora_rank=RANK, max_loras=SLOTS, lora_dtype=dtype)
    return layer


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(seed: int, width: int, rank: int = RANK) -> Pair:
    return random(seed, rank, INPUTS), random(seed + 1000, width, rank)


def adapter(seed: int, targets: Sequence[int] = (0, 2), rank: int = RANK) -> list[Pair | None]:
    return [pair(10 * seed + i, WIDTHS[i], rank) if i in targets else None for i in range(3)]


def load(layer: Any, slot: int, pairs: list[Pair | None]) -> None:
    layer.set_lora(slot, [p and p[0] for p in pairs], [p and p[1] for p in pairs])


def loop(y: Tensor, x: Tensor, slot_of_row: Sequence[int], adapters: Adapters) -> Tensor:
    """Token by token in float64, the weights as the layer's dtype holds them."""
    rows = []
    for row, slot in enumerate(slot_of_row):
        pairs = adapters.get(slot, [None] * 3)
        update = [
            p[1].to(y.dtype).double() @ (p[0].to(y.dtype).double() @ x[row].double()) if p else torch.zeros(width)
            for p, width in zip(pairs, WIDTHS, strict=True)
        ]
        rows.append(y[row].double() + torch.cat(update))
    return torch.stack(rows)


def run(layer: Any, y: Tensor, x: Tensor) -> Tensor:
    return layer._apply_lora_to_output(x, y.clone())


def batch(slot_of_row: Sequence[int], dtype: torch.dtype = torch.float32) -> Pair:
    return random(1, len(slot_of_row), sum(WIDTHS)).to(dtype), random(2, len(slot_of_row), INPUTS).to(dtype)


def assert_right(layer: Any, slot_of_row: Sequence[int], adapters: Adapters) -> None:
    y, x = batch(slot_of_row)
    torch.testing.assert_close(run(layer, y, x).double(), loop(y, x, slot_of_row, adapters), rtol=1e-5, atol=1e-5)


# slot 3 stays empty
ADAPTERS: Adapters = {0: adapter(0), 1: adapter(1, (0, 1, 2)), 2: adapter(2, (1,)), 4: adapter(4, (0, 2), rank=3)}
BATCHES = {
    "decode, distinct": [4, 0, 2, 1],
    "decode, some without": [-1, 0, 2, -1, 4],
    "decode, the same": [1, 1, 1],
    "gangs": [0, 1, 4] * 5,
    "gangs of particles twice": [4, 4, 1, 1] * 2,
    "gangs, one smaller": [0, 1, 4, 0, 1, 4, 0, 4],
    "one row": [4],
    "prefill": [0] * 40 + [-1] * 9 + [2] + [4] * 17 + [0] * 3 + [1] * 40,
    "uneven": [0] * 90 + [1, 2, 4, 3],
    "slot without weights": [3, 3, 0],
    "no adapter": [-1, -1],
}


@pytest.mark.parametrize("slot_of_row", BATCHES.values(), ids=BATCHES.keys())
def test_every_token_gets_its_own_adapter(slot_of_row: list[int]) -> None:
    assert_right(qkv(wrapper(slot_of_row), ADAPTERS), slot_of_row, ADAPTERS)


@pytest.mark.parametrize("slot_of_row", [BATCHES["decode, distinct"], BATCHES["prefill"]])
def test_bfloat16_is_at_least_as_accurate_as_stock(slot_of_row: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = qkv(wrapper(slot_of_row), ADAPTERS, torch.bfloat16)
    y, x = batch(slot_of_row, torch.bfloat16)
    exact, ours = loop(y, x, slot_of_row, ADAPTERS), run(layer, y, x).double()
    torch.testing.assert_close(ours, exact, rtol=2**-8, atol=1e-6)  # one rounding
    use_stock(monkeypatch)
    adapted = torch.tensor(slot_of_row) >= 0
    stock = run(layer, y, x).double()
    assert (ours - exact)[adapted].norm() <= (stock - exact)[adapted].norm()


def test_stock_gives_tokens_without_adapter_the_last_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stock(monkeypatch)
    layer = qkv(wrapper([0, -1]), ADAPTERS)
    y, x = batch([0, -1])
    assert not torch.equal(run(layer, y, x)[1], y[1]), (
        "vLLM fixed this itself: say so in server/engine/compat/cpu_lora.py"
    )


def test_rows_at_even_distances_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "index_select", lambda *_: pytest.fail("copied"))
    for slot_of_row in (BATCHES["gangs"], BATCHES["decode, distinct"], [1] * 40, [0] * 20 + [4] * 20, [2]):
        assert_right(qkv(wrapper(slot_of_row), ADAPTERS), slot_of_row, ADAPTERS)


def test_slots_are_reloaded_and_emptied() -> None:
    slot_of_row = [0, 1, 1]
    adapters: Adapters = {}
    layer = qkv(wrapper(slot_of_row), adapters)
    for slot, pairs in [
        (0, adapter(0)),
        (1, adapter(1, (1,))),
        (0, adapter(5)),
        (0, [None] * 3),
        (0, adapter(6, (1, 2), 2)),
        (1, adapter(7)),
    ]:
        adapters[slot] = pairs
        load(layer, slot, pairs) if any(pairs) else layer.reset_lora(slot)
        for _ in range(2):  # the first step after a write, and the one that finds everything remembered
            assert_right(layer, slot_of_row, adapters)


def test_a_step_is_never_served_with_the_rows_of_the_one_before() -> None:
    layer = qkv(wrapper([0, 1, 4]), ADAPTERS)
    for slot_of_row in ([0, 1, 4], [4, 1, 0], [-1, 1, 0], [0, 1, 4, 4], [0, 1, 4]):
        route(layer.punica_wrapper, slot_of_row)
        assert_right(layer, slot_of_row, ADAPTERS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_row_suffers_from_anothers_adapter_or_input(bad: float) -> None:
    slot_of_row = [0, 1, 1, 4, 0, -1]
    layer = qkv(wrapper(slot_of_row), ADAPTERS)
    y, x = batch(slot_of_row)
    clean = run(layer, y, x)
    x[3] = bad  # adapter 4's only row
    load(layer, 1, [(a * bad, b) for a, b in filter(None, ADAPTERS[1])])
    assert torch.equal(run(layer, y, x)[[0, 4, 5]], clean[[0, 4, 5]])


def test_layers_no_adapter_of_the_batch_touches_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = qkv(wrapper([2, 2]), {0: ADAPTERS[0]})
    scans: list[int] = []
    make = cpu_lora.Layer.of
    monkeypatch.setattr(cpu_lora.Layer, "of", lambda *layer: scans.append(1) or make(*layer))
    monkeypatch.setattr(cpu_lora.Blocks, "gather", lambda *_: pytest.fail("computed"))
    y, x = batch([2, 2])
    for _ in range(3):
        assert torch.equal(run(layer, y, x), y)
    assert len(scans) == 1, "a layer's slots are scanned once, not in every step"


def test_lm_head() -> None:
    sampled = [1, -1, 0]
    layer = bare(LogitsProcessorWithLoRA, wrapper([1] * 5 + [-1] * 4 + [0], sampled), torch.float32)
    layer.base_layer, layer.hidden_size, layer.dtype = SimpleNamespace(vocab_size=VOCAB), INPUTS, torch.float32
    layer.sharded_to_full_mapping = None
    layer.create_lora_weights(SLOTS, layer.lora_config)
    y, x = random(1, 3, VOCAB + 14), random(2, 3, INPUTS)  # padded vocabulary

    def logits(x: Tensor) -> Tensor:
        out = y[:1].repeat(len(x), 1) if len(x) != 3 else y.clone()
        layer.punica_wrapper.add_lora_logits(out, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0)
        return out

    assert torch.equal(logits(x), y)
    a, b = pair(3, VOCAB)
    layer.set_lora(1, a, b)
    expected = y.clone()
    expected[0, :VOCAB] += b @ (a @ x[0])
    torch.testing.assert_close(logits(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(random(4, 7, INPUTS)), y[:1].repeat(7, 1)), "prompt_logprobs: rows of one prompt"


def test_embedding() -> None:
    slot_of_row = [1, -1, 0, 1]
    layer = bare(VocabParallelEmbeddingWithLoRA, wrapper(slot_of_row), torch.float32)
    layer.base_layer = nn.Embedding(VOCAB, INPUTS)
    layer.base_layer.org_vocab_size, layer.base_layer.embedding_dim = VOCAB, INPUTS
    layer.create_lora_weights(SLOTS, layer.lora_config)
    tokens = torch.tensor([3, 4, 5, 49])
    assert torch.equal(layer(tokens), layer.base_layer(tokens))
    a, b = random(1, RANK, VOCAB), random(2, INPUTS, RANK)
    layer.set_lora(1, a, b)
    expected = layer.base_layer(tokens) + (b @ a[:, tokens]).T * torch.tensor([[1], [0], [0], [1]])
    torch.testing.assert_close(layer(tokens), expected, rtol=1e-5, atol=1e-5)


def test_compiled_code_calls_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    slot_of_row = [0, -1, 4, 1]
    layer = qkv(wrapper(slot_of_row), ADAPTERS)
    y, x = batch(slot_of_row)
    plain, calls = run(layer, y, x), []
    operator = torch.ops.vllm.posterior_add_lora
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.ops.vllm, "posterior_add_lora", lambda *args: calls.append(args) or operator(*args))
    assert torch.equal(run(layer, y, x), plain)
    (arguments,) = calls
    monkeypatch.undo()
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
