"""How sure may answers be on rows unlike the training rows, and can the training rows tell?

    python -m benchmarks.unseen --data FOLDER --sets sst2 arc_easy

For each set one default Laplace fit: its prior precision lambda by independent dense algebra, and what several
covariances around the same theta* are worth on other rows of the training file, which no cell of the grid uses, with
95 % bootstrap intervals. `--work` keeps the fits, so a second run only evaluates.

A covariance of theta is told by its scores alone, and "exact" and "in the span" give all training rows the same: the
latter takes the prior's variance away from directions in which no training row's score moves. So training, likelihood
and evidence are the same for both, whatever the labels: only other rows can tell which is right.

Dense: all B together (A is certain: the prior holds it), J [N (C-1), D] the training rows' Jacobians, K = J J^T, W the
expected Fisher of their scores, r the residuals, c = J (theta* - theta_0).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from benchmarks.cells import CALIBRATION, Cell, read
from posterior.calibration.metrics import estimate
from posterior.curvature.kfac import fisher_columns
from posterior.data.examples import ROWS, TOKENS, Batch, Examples, batches, encode
from posterior.laplace.blockwise import LOG_BOUNDS
from posterior.laplace.linearized import jacobians
from posterior.likelihood.scores import draws
from posterior.models import lora
from posterior.models.base import Base, load_model, load_tokenizer, resolve
from posterior.predictive.mixture import from_gaussian
from posterior.storage import artefact

FACTORS = (1.0, 2.0, 4.0)  # of lambda
SMALL = 1e-9  # of K's largest eigenvalue: below it a direction is rounding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with arc_easy/, openbookqa/, sst2/, ...")
    parser.add_argument("--sets", nargs="+", default=["sst2", "arc_easy"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=128, help="training rows (default %(default)s)")
    parser.add_argument("--other-rows", type=int, default=400, help="other rows, at most (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--work", type=Path, help="folder that keeps the fitted posteriors between runs")
    args = parser.parse_args()
    base = resolve()
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.sets:
            data = read(name, args.data, args.rows)
            first = args.rows + CALIBRATION  # of the rows that the grid neither fits nor calibrates on
            other = read(name, args.data, first + args.other_rows, 0).train[first:]
            posterior = Cell(data, args.seed, "laplace", 8, args.dtype).fit(args.work or Path(scratch))[0]
            print(f"\n### {name}: {args.rows} rows, seed {args.seed}; {len(other)} other rows\n", flush=True)
            print(report(base, posterior, data.train, other, args.dtype), flush=True)


@dataclass(frozen=True)
class Dense:
    """What the training rows say of B: K, r, c, and R with R R^T = W, in float64; |theta* - theta_0|^2; log p(D|theta*)
    expected over the scores' spread."""

    gram: Tensor
    root: Tensor
    residual: Tensor
    moved: Tensor
    distance: float
    log_likelihood: float

    def whitened(self, precision: float) -> Tensor:
        """I + R^T K R / lambda."""
        inner = self.root.mT @ self.gram @ self.root / precision
        return inner + torch.eye(len(inner), dtype=inner.dtype)

    def evidence(self, precision: float) -> float:
        """As the fit has it: theta* taken for the posterior's mean."""
        return self.log_likelihood - (precision * self.distance + _logdet(self.whitened(precision))) / 2

    def local_evidence(self, precision: float) -> float:
        """Of the same quadratic in theta around theta*, integrated exactly: where theta* is not its maximum (training
        ends before), g^T P^-1 g / 2 comes in, g the gradient of the log joint. |theta* - theta_0|^2 cancels."""
        step = self.gram @ self.residual - precision * self.moved  # J g
        inside = self.root.mT @ step
        solved = torch.linalg.solve(self.whitened(precision), inside)
        gain = self.residual @ step / precision - self.residual @ self.moved - inside @ solved / precision**2
        return self.log_likelihood + (float(gain) - _logdet(self.whitened(precision))) / 2

    def covariance(self, prior: Tensor, cross: Tensor, precision: float) -> Tensor:
        """J_x P^-1 J_x^T [M, M] of scores with J_x J_x^T = prior and J_x J^T = cross [M, N (C-1)]."""
        known = cross @ self.root
        return (prior - known @ torch.linalg.solve(self.whitened(precision), known.mT) / precision) / precision

    def in_span(self, cross: Tensor) -> Tensor:
        """J_x J_x^T of the part of J_x in the span of J's rows."""
        inside = cross @ self.basis
        return inside @ inside.mT

    @cached_property
    def basis(self) -> Tensor:
        """V with V V^T = K^+, by which J^T V is an orthonormal basis of the span of J's rows."""
        values, vectors = torch.linalg.eigh(self.gram)
        kept = values > SMALL * values[-1]
        found: Tensor = vectors[:, kept] * values[kept].rsqrt()
        return found


def _logdet(matrix: Tensor) -> float:
    return 2 * float(torch.linalg.cholesky(matrix).diagonal().log().sum())


def best(evidence: Callable[[float], float]) -> float:
    """The precision of the highest evidence."""
    found = minimize_scalar(lambda log: -evidence(math.exp(log)), bounds=LOG_BOUNDS, method="bounded")
    return math.exp(float(found.x))


def dense(model: Any, posterior: artefact.Posterior, examples: Examples) -> tuple[Dense, Tensor]:
    """Of the training rows, with C answers each; and J [N (C-1), D]."""
    matrices, theta = lora.matrices(model), lora.get(model)
    names = [name for name in matrices if name.endswith(".B")]  # which start at zero
    moved = torch.cat([lora.orient(name, theta[name]).flatten() for name in names]).float()
    parts, roots, residuals, total = [], [], [], 0.0
    for _, batch in batches(examples, ROWS, tokens=TOKENS):
        f, jacobian, spread = _scores(model, posterior, batch)
        f = draws(f, replace(batch, spread=spread))
        truth = torch.nn.functional.one_hot(batch.label, f.shape[2])
        residuals.append((truth - f.softmax(2).mean(1))[:, 1:].flatten())
        roots += list(fisher_columns(f)[:, 1:])
        total += float(f.log_softmax(2).mean(1).gather(1, batch.label[:, None]).sum())
        parts.append(jacobian.flatten(0, 1))
    stacked = torch.cat(parts)
    root, gram = torch.block_diag(*roots), (stacked @ stacked.mT).double()
    distance = float(moved.double().square().sum())
    return Dense(gram, root, torch.cat(residuals), (stacked @ moved).double(), distance, total), stacked


def _scores(model: Any, posterior: artefact.Posterior, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, C], the Jacobians of B [B, C-1, D], and the scores' covariance [B, C, C] by the posterior."""
    uncertain = {
        name: module for name, module in lora.matrices(model).items() if name in posterior.covariance.precision
    }
    f, parts = jacobians(model, uncertain, batch)
    found = [(name, part.cpu()) for name, part in parts]
    jacobian = torch.cat([part.flatten(2) for name, part in found if name.endswith(".B")], 2).float()
    (covariance,) = posterior.covariance.of_scores(iter(found))
    return f.cpu(), jacobian, torch.nn.functional.pad(covariance, (1, 0, 1, 0))


def report(base: Base, posterior: artefact.Posterior, train: Any, other: Any, dtype: str) -> str:
    """Lambda three ways, and a table of covariances."""
    model: Any = lora.load_peft(load_model(base, getattr(torch, dtype), "cpu"), posterior.map_dir)
    model.eval().requires_grad_(False)
    tokenizer: Any = load_tokenizer(base)
    rows, others = (encode(posterior.task, tokenizer, each) for each in (train, other))
    data, stacked = dense(model, posterior, rows)
    precision = next(value for name, value in posterior.covariance.precision.items() if name.endswith(".B"))
    share = float(data.in_span(data.moved[None])) / data.distance
    lines = [
        f"lambda {precision:.2f}; by the dense Fisher {best(data.evidence):.2f}, and where theta* need not be the "
        f"maximum {best(data.local_evidence):.2f}. Of |B|^2 {share:.2f} is in the span of the rows' gradients.",
        "",
        "| covariance | variance of scores: training rows | other rows | accuracy | NLL | gap |",
        "|---" * 6 + "|",
    ]
    at_train, _ = covariances(model, posterior, rows, data, stacked, precision)
    at_other, scores = covariances(model, posterior, others, data, stacked, precision)
    y = torch.tensor([example.label for example in others])
    for name, found in at_other.items():
        p = torch.stack([from_gaussian(f, each).probability for f, each in zip(scores, found, strict=True)])
        metrics = estimate(p, y)
        cells = [f"{_variance(each[name]):.2f}" for each in (at_train, at_other)]
        cells += [str(metrics[metric]) for metric in ("accuracy", "nll", "gap")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def covariances(
    model: Any,
    posterior: artefact.Posterior,
    examples: Examples,
    data: Dense,
    stacked: Tensor,
    precision: float,
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """The scores' covariances [C, C] of each example by each Gaussian, and its scores [C]."""
    found: dict[str, list[Tensor]] = {}
    scores: dict[int, Tensor] = {}
    order: list[int] = []
    for indices, batch in batches(examples, ROWS, tokens=TOKENS):
        f, jacobian, spread = _scores(model, posterior, batch)
        for row, index in enumerate(indices):
            own, cross = jacobian[row].double(), (jacobian[row] @ stacked.mT).double()
            prior = own @ own.mT
            laws = {"none: theta* alone": torch.zeros_like(spread[row]), "of the fit": spread[row]}
            for factor in FACTORS:
                name = "exact" if factor == 1 else f"exact, {factor:g} lambda"
                laws[name] = _padded(data.covariance(prior, cross, factor * precision))
            laws["exact, in the span"] = _padded(data.covariance(data.in_span(cross), cross, precision))
            for name, law in laws.items():
                found.setdefault(name, []).append(law)
            scores[index] = f[row]
            order.append(index)
    places = sorted(range(len(order)), key=order.__getitem__)
    return {name: [each[place] for place in places] for name, each in found.items()}, [
        scores[index] for index in sorted(scores)
    ]


def _padded(covariance: Tensor) -> Tensor:
    """With the first answer's, whose score is certain."""
    return torch.nn.functional.pad(covariance, (1, 0, 1, 0))


def _variance(covariances: Sequence[Tensor]) -> float:
    """The mean over rows and answers but the first."""
    return float(torch.stack([each.diagonal()[1:].mean() for each in covariances]).mean())


if __name__ == "__main__":
    main()
