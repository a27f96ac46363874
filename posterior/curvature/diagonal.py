"""The diagonal of the Fisher of one LoRA matrix: exact entry by entry, and silent on how entries go together.

The entry of W_ij is sum_n E[(sum_t g_ti a_tj)^2], from the gradient of each example; nothing is approximated but the
rest of the block, which is taken for zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from posterior.data.examples import Batch
from posterior.errors import PosteriorError


@dataclass(frozen=True)
class Diagonal:
    """Curvature H = diag(values) of one matrix; values [r, d] >= 0 in the orientation of kfac.Kronecker."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def eigenvalues(self) -> tuple[Tensor, Tensor, int]:
        """As kfac.Kronecker's; nothing remains."""
        return self.values, self.values.new_zeros(len(self.values)), 0

    def to(self, device: torch.device | str) -> Diagonal:
        return Diagonal(self.values.to(device))

    def scaled(self, factor: float) -> Diagonal:
        return Diagonal(factor * self.values)

    def coordinates(self, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """As kfac.Kronecker's: the matrix's own coordinates."""
        return jacobian, jacobian

    def leading(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """As kfac.Kronecker's: the columns of the largest curvature."""
        values = self.values.double().cpu()
        columns = values.sum(0).topk(min(count, values.shape[1])).indices
        rows, width = values.shape
        return torch.eye(rows).double(), one_hot(columns, width).double().T, values[:, columns]


class Entries:
    """Running sum of the squared entries of every example's gradient of one matrix."""

    def __init__(self, name: str):
        self.name = name
        self.total: Tensor | None = None

    def add(self, a: Tensor, g: Tensor, batch: Batch, _first: bool) -> None:
        """Inputs a and output gradients g, [S, T, width]."""
        a, g = by_example(a, g, batch)
        squares = (g.mT @ a).square().sum(0)
        self.total = squares if self.total is None else self.total + squares

    def block(self) -> Diagonal:
        assert self.total is not None
        if not bool(torch.isfinite(self.total).all()):
            raise PosteriorError("the curvature is not finite: the adapter has diverged; lower the learning rate")
        return Diagonal((self.total if self.name.endswith(".A") else self.total.T).contiguous())


def by_example(a: Tensor, g: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """a, zero at pad positions, and g as [examples, positions, width]: all the sequences of an example together."""
    examples = len(batch.label)
    masked = (a * batch.mask[..., None]).to(g.dtype)
    return masked.view(examples, -1, a.shape[-1]), g.view(examples, -1, g.shape[-1])
