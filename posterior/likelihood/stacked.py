"""K adapters in one forward pass: the base's weights are read once, for K blocks of rows.

PEFT's own forward stays: only its A and B modules are exchanged for stacks of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from posterior.data.examples import Batch
from posterior.models import lora


class StackedLinear(nn.Linear):
    """K linear maps, weight [K, out, in]. The rows of the input are K blocks, one for each map: [K * S, T, in] ->
    [K * S, T, out]."""

    def __init__(self, weight: Tensor):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape[1:]
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        blocks = input.reshape(len(self.weight), -1, self.in_features)
        return torch.bmm(blocks, self.weight.mT).reshape(*input.shape[:-1], self.out_features)


def stack(thetas: Sequence[lora.Theta]) -> lora.Theta:
    """One theta whose matrices are [K, ...]."""
    return {name: torch.stack([theta[name] for theta in thetas]) for name in thetas[0]}


def unstack(theta: lora.Theta) -> list[lora.Theta]:
    count = len(next(iter(theta.values())))
    return [{name: value[index].clone() for name, value in theta.items()} for index in range(count)]


@contextmanager
def stacked(model: nn.Module, theta: lora.Theta) -> Iterator[None]:
    """The model with its adapter's matrices replaced by `theta`'s stacks; afterwards it is as it was.

    Within, `lora.matrices`, `get` and `put` see the stacks.
    """
    layers = {
        name.removeprefix("base_model.model."): module for name, module in model.named_modules() if _is_lora(module)
    }
    places = {f"{name}.{side}": getattr(module, f"lora_{side}") for name, module in layers.items() for side in "AB"}
    plain = {name: place[lora.ADAPTER] for name, place in places.items()}
    try:
        for name, place in places.items():
            place[lora.ADAPTER] = StackedLinear(theta[name])
        yield
    finally:
        for name, place in places.items():
            place[lora.ADAPTER] = plain[name]


def repeat(batch: Batch, count: int) -> Batch:
    """The batch `count` times, one block after the other."""
    return batch.map(lambda tensor: tensor.repeat(count, *[1] * (tensor.ndim - 1)))


def _is_lora(module: nn.Module) -> bool:
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and lora.ADAPTER in module.lora_A  # type: ignore[operator]
