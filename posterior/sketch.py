"""A sketch of the whole Fisher (= GGN) of all LoRA matrices together: its spectrum, which no set of blocks knows.

The rows of a root of the Fisher are Phi = L^T J [N (C-1), D] with D all the parameters: the Fisher is Phi^T Phi. Let
Omega [D, m] be random with E[Omega Omega^T] = I. The Gram matrix (Phi Omega)^T (Phi Omega) [m, m] has about the
eigenvalues of the Fisher, better the more columns m there are beside its effective dimension. The columns of Omega are
outer products u w^T of random signs for each matrix (over sqrt(m)), so that Phi Omega follows from the inputs a and
output gradients g of the matrices, without a gradient of a weight being formed:
    z_i = sum over matrices and positions of (g . u_i) (a . w_i) / sqrt(m).
On the narrow side (r wide) each matrix has signs of its own; on the wide side, matrices of the same width share theirs,
which leaves E[Omega Omega^T] = I. The Gram matrix is a sum over the data, hence the same whatever the batch size.

For text the rows are draws of the labels, and the effective dimension cannot exceed their number: with few rows, raise
`--label-samples`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from posterior.data import Batch

COLUMNS = 512  # m; the sketch under-estimates an effective dimension gamma by up to about gamma / m of it


class Sketch:
    """Gram matrix of the sketched Fisher, whitened by the prior; the prior precision of some matrices is left open."""

    def __init__(
        self, matrices: Mapping[str, nn.Linear], fixed: Mapping[str, float], columns: int = COLUMNS, seed: int = 0
    ):
        """`fixed`: the prior precision of the matrices where it is known; all others share one, told later."""
        generator = torch.Generator().manual_seed(seed)
        self.fixed, self.columns = fixed, columns
        self.narrow: dict[str, Tensor] = {}
        self.wide: dict[int, Tensor] = {}
        for name, module in matrices.items():
            small, large = module.weight.shape if name.endswith(".A") else reversed(module.weight.shape)
            self.narrow[name] = _signs(small, columns, generator).to(module.weight)
            if large not in self.wide:
                self.wide[large] = _signs(large, columns, generator).to(module.weight)
        self.gram = torch.zeros(2 * columns, 2 * columns, dtype=torch.float64)

    def add(self, inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], batch: Batch) -> None:
        """One row of Phi for every example: inputs and output gradients [S, T, width] by matrix."""
        examples = len(batch.label)
        sides = torch.zeros(2, examples, self.columns, dtype=torch.float64, device=batch.label.device)
        for name, g in gradients.items():
            a = (inputs[name] * batch.mask[..., None]).to(g)
            small, large = (g, a) if name.endswith(".A") else (a, g)
            product = (small @ self.narrow[name].to(g)) * (large @ self.wide[large.shape[-1]].to(g))
            z = product.view(examples, -1, self.columns).sum(1)
            sides[int(name in self.fixed)] += z * self.fixed.get(name, 1.0) ** -0.5
        z = torch.cat(list(sides.cpu()), 1) * self.columns**-0.5
        self.gram.addmm_(z.T, z)

    def eigenvalues(self, precision: float) -> Tensor:
        """About the largest eigenvalues [m] of the Fisher whitened by the prior; `precision` of the open matrices."""
        (open_open, open_fixed), (_, fixed_fixed) = (rows.chunk(2, 1) for rows in self.gram.chunk(2))
        cross = (open_fixed + open_fixed.T) * precision**-0.5
        values: Tensor = torch.linalg.eigvalsh(open_open / precision + cross + fixed_fixed)
        return values.clamp(min=0)


def _signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (rows, columns), generator=generator) * 2.0 - 1.0
