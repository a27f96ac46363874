"""Kronecker factors of the Fisher (= GGN) of every LoRA matrix, summed over the data.

For a matrix W [out, in] with input a and output gradient g the Fisher is H = sum_n E[vec(sum_t g_t a_t^T) vec(...)^T].
- expand (Martens & Grosse 2015): H ~ (sum over positions of a a^T) (x) (sum over positions of E[g g^T]);
- reduce (Eschenhagen et al. 2023, arXiv 2311.00636): H ~ (sum over n of abar abar^T) (x) (sum over n of
  E[ghat ghat^T]), abar the mean and ghat the sum over an example's positions.
The expectation is over the model's own answers: exact for choices of up to EXACT candidates, as Lambda = diag(p) -
p p^T factorises into C - 1 columns (so C - 1 backward passes, one for two candidates); for more an unbiased estimate in
as few columns; sampled tokens for text.

One side of each matrix is r wide ("small"), the other d wide ("large"). The large factor is either kept whole, or in
rank k from a Nystroem sketch Y = S Omega (Tropp et al. 2017, arXiv 1706.05736): memory O(d k), one pass, and, because
the sketch is linear in the data, the same result whatever the batch size. The trace that rank k discards is kept as an
isotropic remainder.

A Kronecker product of sums ignores how a and g go together. Each block is therefore scaled to the trace of the exact
block, sum_n E|sum_t g_t a_t^T|^2, which a T x T Gram product per example gives in the same pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from posterior.curvature.diagonal import Diagonal, Entries, by_example
from posterior.curvature.sketch import Sketch
from posterior.data.examples import Batch
from posterior.errors import PosteriorError
from posterior.likelihood.directions import EXACT
from posterior.likelihood.scores import Tape, arranged, draws, record, sampled_score, scores

Sharing = Literal["expand", "reduce"]
Structure = Literal["full", "kfac", "diagonal"]


@dataclass(frozen=True)
class Factor:
    """S ~= basis diag(values) basis^T + rest (I - basis basis^T); basis [d, k], values [k] >= 0, rest >= 0."""

    basis: Tensor
    values: Tensor
    rest: float

    def to(self, device: torch.device | str) -> Factor:
        return replace(self, basis=self.basis.to(device), values=self.values.to(device))


@dataclass(frozen=True)
class Kronecker:
    """Curvature H = small (x) large of one matrix, in the orientation [r, d] (A as it is, B transposed)."""

    small: Factor
    large: Factor

    @property
    def shape(self) -> tuple[int, int]:
        return self.small.basis.shape[0], self.large.basis.shape[0]

    def eigenvalues(self) -> tuple[Tensor, Tensor, int]:
        """(kept [r, k], of the remainder [r], multiplicity d - k of each of the latter)."""
        multiplicity = self.large.basis.shape[0] - self.large.basis.shape[1]
        return self.small.values[:, None] * self.large.values, self.small.values * self.large.rest, multiplicity

    def to(self, device: torch.device | str) -> Kronecker:
        return Kronecker(self.small.to(device), self.large.to(device))

    def scaled(self, factor: float) -> Kronecker:
        return replace(self, small=replace(self.small, values=factor * self.small.values))

    def coordinates(self, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        """A jacobian [N, C, r, d] in the eigenbases: (of both sides [N, C, r, k], of the small side [N, C, r, d])."""
        rotated = torch.einsum("ri,ncrd->ncid", self.small.basis.to(jacobian), jacobian)
        return rotated @ self.large.basis.to(jacobian), rotated

    def leading(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the `count` leading directions of the large side, in float64 on the CPU: the small side's basis [r, r],
        their own [d, m], and the eigenvalues [r, m]."""
        values, columns = self.large.values.double().cpu().topk(min(count, len(self.large.values)))
        small, large = self.small.basis.double().cpu(), self.large.basis.double().cpu()[:, columns]
        return small, large, self.small.values.double().cpu()[:, None] * values


Block = Kronecker | Diagonal


class _Sum:
    """Running sum of x x^T over rows x, whole (omega None) or as the sketch (sum x x^T) omega with its trace."""

    def __init__(self, width: int, rank: int | None, seed: int, like: Tensor):
        self.rank = rank if rank is not None and rank < width else None
        self.trace = 0.0
        self.omega: Tensor | None = None
        if self.rank is not None:
            generator = torch.Generator().manual_seed(seed)
            columns = min(width, 2 * self.rank + 8)
            omega = torch.linalg.qr(torch.randn(width, columns, generator=generator, dtype=torch.float64))[0]
            self.omega = omega.to(like)
        self.total = like.new_zeros(width, width if self.omega is None else self.omega.shape[1])

    def add(self, x: Tensor) -> None:
        self.total.addmm_(x.T, x if self.omega is None else x @ self.omega)
        self.trace += float(x.square().sum())

    def factor(self, scale: float) -> Factor:
        total = self.total.double() * scale
        if not bool(torch.isfinite(total).all()):
            raise PosteriorError("the curvature is not finite: the adapter has diverged; lower the learning rate")
        if self.omega is None:
            values, basis = torch.linalg.eigh((total + total.T) / 2)
            return Factor(basis.to(self.total), values.clamp(min=0).to(self.total), 0.0)
        values, basis = _nystroem(total, self.omega.double())
        kept, basis = values[: self.rank], basis[:, : self.rank]
        rest = max(0.0, self.trace * scale - float(kept.sum())) / (len(total) - len(kept))
        return Factor(basis.contiguous().to(self.total), kept.to(self.total), rest)


def _nystroem(sketch: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors of the Nystroem approximation (Tropp et al. 2017, algorithm 3)."""
    shift = math.sqrt(len(sketch)) * torch.finfo(torch.float32).eps * float(sketch.norm())  # the sums are float32
    if shift == 0.0:
        return sketch.new_zeros(sketch.shape[1]), omega
    shifted = sketch + shift * omega
    core = omega.T @ shifted
    chol = torch.linalg.cholesky((core + core.T) / 2)
    left = torch.linalg.solve_triangular(chol, shifted.T, upper=False).T
    basis, singular, _ = torch.linalg.svd(left, full_matrices=False)
    return (singular.square() - shift).clamp(min=0), basis


class _Factors:
    """Running sums of the two Kronecker factors of one matrix, and of its block's exact trace."""

    def __init__(self, name: str, sharing: Sharing, rank: int | None, seed: int):
        self.name, self.sharing, self.rank, self.seed = name, sharing, rank, seed
        self.sums: tuple[_Sum, _Sum] | None = None
        self.trace = 0.0

    def add(self, a: Tensor, g: Tensor, batch: Batch, first: bool) -> None:
        """Inputs a and output gradients g, [S, T, width]; first: these inputs were not yet added."""
        self.trace += _exact_trace(a, g, batch)
        a, g = _rows(a, g, batch, self.sharing)
        if self.sums is None:
            wide = self.name.endswith(".A")
            self.sums = (
                _Sum(a.shape[1], self.rank if wide else None, self.seed, a),
                _Sum(g.shape[1], None if wide else self.rank, self.seed, g),
            )
        if first:
            self.sums[0].add(a)
        self.sums[1].add(g)

    def block(self) -> Kronecker:
        assert self.sums is not None
        a, g = self.sums
        return _oriented(self.name, a.factor(_matched(a, g, self.trace)), g.factor(1.0))


def fit(
    model: nn.Module,
    matrices: dict[str, nn.Linear],
    batches: Iterable[Batch],
    *,
    structure: Structure = "kfac",
    sharing: Sharing = "expand",
    rank: int | None = None,
    samples: int = 1,
    seed: int = 0,
    sketch: Sketch | None = None,
    progress: Callable[[int], object] = lambda rows: None,
) -> dict[str, Block]:
    """The curvature of every matrix over all batches: Kronecker factors, or its diagonal
    (posterior/curvature/diagonal.py). What "full" adds is the sketch's.

    The model must be in eval mode (dropout would add noise to the curvature) and need no parameter gradients.
    `sharing` and `rank` are of the Kronecker factors. `samples`: label draws per example for text. `sketch` is filled
    in the same pass. `progress` is told the number of examples after each batch.
    """
    if model.training:
        raise PosteriorError("curvature needs eval mode: dropout would change it; call model.eval() first")
    sums: dict[str, _Factors | Entries] = {
        name: Entries(name) if structure == "diagonal" else _Factors(name, sharing, rank, seed + number)
        for number, name in enumerate(matrices)
    }
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    for batch in batches:
        batch = arranged(model, batch)
        with record(matrices) as tape:
            first = True
            for grads in _gradients(model, tape, batch, samples, generator):
                for name, grad in grads.items():
                    sums[name].add(tape.inputs[name], grad, batch, first)
                if sketch is not None:
                    sketch.add(tape.inputs, grads, batch)
                first = False
        seen += len(batch.label)
        progress(len(batch.label))
    if not seen:
        raise PosteriorError("no data to compute the curvature from")
    return {name: each.block() for name, each in sums.items()}


def _matched(a: _Sum, g: _Sum, trace: float) -> float:
    """The scale of the input factor at which the block's trace is the exact one."""
    product = a.trace * g.trace
    return trace / product if product > 0 else 0.0


def _oriented(name: str, a: Factor, g: Factor) -> Kronecker:
    return Kronecker(small=g, large=a) if name.endswith(".A") else Kronecker(small=a, large=g)


def _gradients(
    model: nn.Module, tape: Tape, batch: Batch, samples: int, generator: torch.Generator
) -> Iterable[dict[str, Tensor]]:
    """Output gradients whose outer products sum to the Fisher of the batch."""
    if batch.target is not None and len(batch.label) == batch.target.shape[:2].numel():
        for _ in range(samples):
            drawn = sampled_score(model, batch, generator)
            yield tape.gradients(drawn, torch.full_like(drawn, samples**-0.5), keep=False)
        return
    f = scores(model, batch)
    if not bool(torch.isfinite(f).all()):
        raise PosteriorError("the scores are not finite: the adapter has diverged; lower the learning rate")
    columns = few(fisher_columns(draws(f.detach(), batch)), generator)
    for c in range(columns.shape[2]):
        yield tape.gradients(f, columns[:, :, c], keep=c + 1 < columns.shape[2])


def fisher_columns(f: Tensor) -> Tensor:
    """Columns L [B, C, C-1] with L L^T = E[diag(p) - p p^T], p = softmax(f): the Fisher of the scores.

    f [B, M, C]: the expectation is over the M draws of the scores (M = 1: at a point).
    """
    p = f.double().softmax(2)
    fisher = torch.diag_embed(p.mean(1)) - p.mT @ p / p.shape[1]
    values, vectors = torch.linalg.eigh(fisher)
    columns: Tensor = vectors * values.clamp(min=0).sqrt()[:, None, :]
    return columns[:, :, 1:].to(f)


def few(columns: Tensor, generator: torch.Generator) -> Tensor:
    """Of columns L [B, C, D], by growing size, at most EXACT - 1, with the same E[L L^T].

    The largest stay; the last is the sum of all others, each with a random sign. That has less variance than as many
    sampled labels (benchmarks/options.py).
    """
    if columns.shape[2] < EXACT:
        return columns
    others, largest = columns.tensor_split([2 - EXACT], 2)
    signs = torch.randint(0, 2, (len(others), others.shape[2], 1), generator=generator) * 2 - 1
    return torch.cat([largest, others @ signs.to(others)], 2)


def _exact_trace(a: Tensor, g: Tensor, batch: Batch) -> float:
    """sum over the batch's examples of |sum_t g_t a_t^T|_F^2, without forming the matrices."""
    a, g = by_example(a, g, batch)
    return float(((a @ a.mT) * (g @ g.mT)).sum())


def _rows(a: Tensor, g: Tensor, batch: Batch, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients as rows: one per real position (expand) or one per example (reduce)."""
    mask = batch.mask.bool()
    a = a.to(g.dtype)
    if sharing == "expand":
        return a[mask], g[mask]
    groups = len(batch.label)
    weight = mask[..., None].to(g.dtype)
    total = (a * weight).view(groups, -1, a.shape[-1]).sum(1)
    return total / weight.view(groups, -1).sum(1, keepdim=True), (g * weight).view(groups, -1, g.shape[-1]).sum(1)
