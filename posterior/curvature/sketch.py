"""The whole Fisher (= GGN) of all LoRA matrices together, through a sketch: its spectrum, and the covariance of scores
that it leaves, which no set of blocks knows.

The rows of a root of the Fisher are Phi = L^T J [N (C-1), D] with D all the parameters: the Fisher is Phi^T Phi. Let
Omega [D, m] be random with E[Omega Omega^T] = I. The Gram matrix (Phi Omega)^T (Phi Omega) [m, m] has about the
eigenvalues of the Fisher, better the more columns m there are beside its effective dimension. The columns of Omega are
outer products u w^T of random signs for each matrix (over sqrt(m)), so that a gradient G [r, d] of a matrix is
projected to u^T G w, without the other matrices and one example at a time. On the narrow side (r) each matrix has signs
of its own; on the wide side, matrices of the same width share theirs, which leaves E[Omega Omega^T] = I. The Gram
matrix is a sum over the data, hence the same whatever the batch size.

The covariance of scores with Jacobian J is K - K_D (I + K_DD)^-1 K_D^T, with K = J P_0^-1 J^T the prior's and D the
data. K is computed exactly; what the data leave of it is (J Omega) (I + G)^-1 (J Omega)^T in the sketch, G the Gram
matrix, all whitened by the prior P_0 (cf. Sharma, Azizan & Pavone 2021, arXiv 2102.12567).

For text the rows are draws of the labels, and the effective dimension cannot exceed their number: with few rows, raise
`--label-samples`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posterior.curvature.diagonal import by_example
from posterior.data.examples import Batch
from posterior.models.lora import orient

COLUMNS = 512  # m; the sketch under-estimates an effective dimension gamma by up to about gamma / m of it
FAINT = 1e-5  # eigenvalues of the whitened Fisher below this change nothing
JITTER = 1e-9  # of a Gram matrix's trace, where candidates have the same gradient


@dataclass(frozen=True)
class Signs:
    """Omega: signs u [r, m] of each matrix and w [d, m] of each width, int8."""

    narrow: dict[str, Tensor]
    wide: dict[int, Tensor]

    @classmethod
    def draw(cls, shapes: Mapping[str, tuple[int, int]], columns: int, seed: int) -> Signs:
        """Of matrices [r, d], by name."""
        generator = torch.Generator().manual_seed(seed)
        narrow: dict[str, Tensor] = {}
        wide: dict[int, Tensor] = {}
        for name, (r, d) in shapes.items():
            narrow[name] = _signs(r, columns, generator)
            if d not in wide:
                wide[d] = _signs(d, columns, generator)
        return cls(narrow, wide)

    @property
    def columns(self) -> int:
        return next(iter(self.narrow.values())).shape[1]

    def to(self, device: torch.device | str) -> Signs:
        return Signs(
            {name: signs.to(device) for name, signs in self.narrow.items()},
            {width: signs.to(device) for width, signs in self.wide.items()},
        )

    def project(self, name: str, gradient: Tensor) -> Tensor:
        """Gradients [..., r, d] of a matrix, as lora.orient has them -> [..., m]."""
        inside = gradient @ self.wide[gradient.shape[-1]].to(gradient)
        scale = math.sqrt(self.columns)
        projected: Tensor = (inside * self.narrow[name].to(gradient)).sum(-2) / scale
        return projected


class Sketch:
    """Gram matrix of the sketched Fisher, whitened by the prior; the prior precision of some matrices is left open."""

    def __init__(
        self, matrices: Mapping[str, nn.Linear], fixed: Mapping[str, float], columns: int = COLUMNS, seed: int = 0
    ):
        """`fixed`: the prior precision of the matrices where it is known; all others share one, told later."""
        shapes = {name: orient(name, module.weight).shape for name, module in matrices.items()}
        self.signs = Signs.draw({name: (r, d) for name, (r, d) in shapes.items()}, columns, seed)
        self.fixed = fixed
        self.gram = torch.zeros(2 * columns, 2 * columns, dtype=torch.float64)

    def add(self, inputs: Mapping[str, Tensor], gradients: Mapping[str, Tensor], batch: Batch) -> None:
        """One row of Phi for every example: inputs and output gradients [S, T, width] by matrix."""
        sides = torch.zeros(2, len(batch.label), self.signs.columns, dtype=torch.float64, device=batch.label.device)
        for name, g in gradients.items():
            a, g = by_example(inputs[name], g, batch)
            z = self.signs.project(name, orient(name, g.mT @ a))
            sides[int(name in self.fixed)] += z * self.fixed.get(name, 1.0) ** -0.5
        z = torch.cat(list(sides.cpu()), 1)
        self.gram.addmm_(z.T, z)

    def eigenvalues(self, precision: float) -> Tensor:
        """About the largest eigenvalues [m] of the Fisher whitened by the prior; `precision` of the open matrices."""
        values: Tensor = torch.linalg.eigvalsh(self._whitened(precision))
        return values.clamp(min=0)

    def log_determinant(self, precision: float) -> float:
        """log det of I + the Fisher whitened by the prior: what `eigenvalues` would tell in four times the time."""
        shifted = self._whitened(precision)
        shifted.diagonal().add_(1)
        return 2 * float(torch.linalg.cholesky(shifted).diagonal().log().sum())

    def full(self, precision: float) -> Full:
        """The Laplace covariance at a prior precision of the open matrices."""
        values, basis = torch.linalg.eigh(self._whitened(precision))
        kept = values > FAINT
        known = dict.fromkeys(self.signs.narrow, precision) | dict(self.fixed)
        return Full(self.signs, known, basis[:, kept], values[kept])

    def _whitened(self, precision: float) -> Tensor:
        (open_open, open_fixed), (_, fixed_fixed) = (rows.chunk(2, 1) for rows in self.gram.chunk(2))
        cross = (open_fixed + open_fixed.T) / math.sqrt(precision)
        whitened: Tensor = open_open / precision + cross + fixed_fixed
        return whitened


@dataclass(frozen=True)
class Full:
    """The covariance P^-1, P = P_0 + the whole Fisher. precision: P_0 of each matrix; the Fisher whitened by it and
    sketched is basis [m, R] diag(values [R]) basis^T, float64."""

    signs: Signs
    precision: Mapping[str, float]
    basis: Tensor
    values: Tensor

    def to(self, device: torch.device | str) -> Full:
        return Full(self.signs.to(device), self.precision, self.basis.to(device), self.values.to(device))

    def rescaled(self, factor: float) -> Full:
        """With `factor` times the prior precision."""
        precision = {name: value * factor for name, value in self.precision.items()}
        return Full(self.signs, precision, self.basis, self.values / factor)

    def of_scores(self, jacobians: Iterable[tuple[str, Tensor]], factors: Sequence[float] = (1.0,)) -> Tensor:
        """J P^-1 J^T [M, B, C, C] in float64, at M multiples of the prior precision, from each matrix's
        [B, C, r, d].

        A random subspace of R dimensions takes up gamma / m of any vector: what is left of it is scaled up by that.
        """
        prior = z = torch.zeros(())
        for name, jacobian in jacobians:
            white = jacobian * self.precision[name] ** -0.5
            prior = prior + _gram(white.flatten(2).double())
            z = z + self.signs.project(name, white).double()
        rescale = _root(prior) @ torch.linalg.inv(_root(_gram(z)))
        inside = z @ self.basis.to(z)
        found = []
        for factor in factors:
            taken = (self.values / (factor + self.values)).to(z)
            share = min(0.5, float(taken.sum()) / self.signs.columns)
            left = _gram(z) - _gram(inside * taken.sqrt())
            found.append(rescale @ left @ rescale.mT / (factor * (1 - share)))
        return torch.stack(found)


def _gram(x: Tensor) -> Tensor:
    return x @ x.mT


def _root(gram: Tensor) -> Tensor:
    """A Cholesky factor of Gram matrices [B, C, C], which may just be singular."""
    size = gram.shape[-1]
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    root: Tensor = torch.linalg.cholesky(gram + (JITTER * trace + torch.finfo(gram.dtype).tiny) * eye)
    return root


def _signs(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1).to(torch.int8)
