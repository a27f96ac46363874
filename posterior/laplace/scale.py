"""How sure the scores may be: their scale s in p(y|x) = softmax(s f), by the evidence, before any training.

The mean of an answer's log-probabilities is no log-probability, so nothing says on which scale the answers' means are
compared. Where the base is far too sure of its answers, a fit at scale 1 must first unlearn that, learns its rows by
heart instead, and stays too sure of all others.

At the initialisation the network is linear in B, and scores are a Gaussian process over the rows: s f = s f_0 + g with
g ~ N(0, v K), K = J J^T the Gram matrix of the Jacobians and v = s^2 / lambda, which is free as the prior precision
lambda is. Its evidence p(D | s, v) (Laplace's approximation; Rasmussen & Williams 2006, algorithm 3.3) asks for what
the base knows of the answers, and not for how well it can be made to fit them. We take the s whose evidence at the best
v is highest, with log s ~ N(0, 1), as scores are not off by orders of magnitude; and s <= 1, as a base that is not sure
enough can be taught. Even where the linear network's evidence asks for more (ARC-Easy), training at a larger scale
(`--scale 4`) has a base to unlearn that is too sure, and does not get there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from posterior.curvature.sketch import Signs
from posterior.data.examples import Examples, batches
from posterior.errors import PosteriorError
from posterior.laplace.linearized import jacobians
from posterior.models import lora

NUMBERS = 384  # scores the process is asked about, at most: a subset of the rows tells one number
COLUMNS = 4096  # of the random projection that K is computed in, which errs by about 1 / sqrt(COLUMNS / 2)
SCALES: tuple[float, ...] = tuple(2.0 ** (-step / 2) for step in range(9))  # s, from 1 to 1/16
# Standard deviations of a score under the prior, as the mean over the rows: sqrt(v tr K / size).
SPREADS: tuple[float, ...] = tuple(2.0 ** (step / 2) for step in range(-8, 11))
TOLERANCE = 1e-6  # nats of the log posterior at which Newton's method stops
ABSENT = -1e4  # score of an answer that a row does not have


def fit(model: Any, examples: Examples, batch_size: int, seed: int = 0) -> float:
    """The scale of the scores of choices; `model` has an adapter with B = 0. The seed is that of the projection."""
    found = evidences(model, examples, batch_size, seed)
    return max(found, key=lambda s: found[s] - math.log(s) ** 2 / 2)


def evidences(model: Any, examples: Examples, batch_size: int, seed: int = 0) -> dict[float, float]:
    """log p(D | s) in nats at the best v, by s, of as many evenly spaced rows as make NUMBERS scores."""
    width = max(len(example.continuations) for example in examples)
    count = min(len(examples), max(1, NUMBERS // (width - 1)))
    chosen = examples.take(i * len(examples) // count for i in range(count))
    f, gram = process(model, chosen, batch_size, seed)
    labels = torch.tensor([example.label for example in chosen])
    variances = [spread**2 / float(gram.diagonal().mean()) for spread in SPREADS]
    return {s: max(evidence(s * f, v * gram, labels) for v in variances) for s in SCALES}


def process(model: Any, examples: Examples, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """f_0 [N, C] and K [N (C-1), N (C-1)], of scores relative to the first answer's; float64 on the CPU."""
    model.eval().requires_grad_(False)
    matrices = {name: module for name, module in lora.matrices(model).items() if name.endswith(".B")}
    device = next(iter(matrices.values())).weight.device
    shapes = {name: lora.orient(name, module.weight).shape for name, module in matrices.items()}
    signs = Signs.draw({name: (r, d) for name, (r, d) in shapes.items()}, COLUMNS, seed).to(device)
    width = max(len(example.continuations) for example in examples)
    f = torch.full((len(examples), width), ABSENT, dtype=torch.float64)
    z = torch.zeros(len(examples), width - 1, COLUMNS, dtype=torch.float64)
    with tqdm(total=len(examples), desc="scale of scores", unit="row", leave=False) as bar:
        for indices, batch in batches(examples, batch_size):
            found, parts = jacobians(model, matrices, batch.to(device))
            answers = found.shape[1]
            f[indices, :answers] = (found - found[:, :1]).cpu()
            for name, jacobian in parts:
                z[indices, : answers - 1] += signs.project(name, jacobian).double().cpu()
            bar.update(len(indices))
    if not (f.isfinite().all() and z.isfinite().all()):
        raise PosteriorError("the base's scores of the answers are not finite; try float32, or another base")
    flat = z.flatten(0, 1)
    return f, flat @ flat.T


def evidence(mean: Tensor, covariance: Tensor, labels: Tensor) -> float:
    """log p(labels [N]) in nats for softmax scores ~ N(mean [N, C], covariance [N (C-1), N (C-1)]), the first answer's
    certain, by Laplace's approximation around the mode mean + covariance a, found by Newton's method."""
    count, width = mean.shape
    one_hot = torch.nn.functional.one_hot(labels, width)[:, 1:].to(mean).flatten()
    eye = torch.eye(len(covariance), dtype=mean.dtype)

    def log_joint(a: Tensor) -> tuple[float, Tensor]:
        moved = covariance @ a
        scores = mean + torch.nn.functional.pad(moved.view(count, -1), (1, 0))
        log_p = scores.log_softmax(1)
        return float(log_p.gather(1, labels[:, None]).sum() - a @ moved / 2), log_p.exp()[:, 1:]

    a = torch.zeros(len(covariance), dtype=mean.dtype)
    value, p = log_joint(a)
    while True:
        blocks = torch.diag_embed(p) - p[..., None] * p[..., None, :]  # of the curvature W, one a row
        curved = (blocks @ covariance.view(count, width - 1, -1)).flatten(0, 1)  # W K
        b = curved @ a + one_hot - p.flatten()
        system = eye + curved
        step, better = torch.linalg.solve(system, b) - a, -math.inf
        size = 2.0
        while better < value and size > 1e-3:
            size /= 2
            better, p = log_joint(a + size * step)
        if better < value + TOLERANCE:
            logdet = torch.linalg.slogdet(system).logabsdet
            return max(value, better) - float(logdet) / 2
        a, value = a + size * step, better
