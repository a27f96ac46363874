"""What a posterior's predictives say of rows, computed with transformers and peft."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from posterior.calibration.metrics import check
from posterior.data.examples import ROWS, TOKENS, Example, Examples, batches
from posterior.errors import PosteriorError
from posterior.laplace import blockwise
from posterior.laplace import linearized as linear
from posterior.likelihood.scores import scores
from posterior.models import lora
from posterior.predictive.mixture import Predictive, entropy, from_particles
from posterior.storage import artefact


@dataclass(frozen=True)
class Predictions:
    """Of N rows with C answers, float64 on the CPU: probability [N, C]; epistemic and total entropy [N], in nats."""

    probability: Tensor
    epistemic: Tensor
    total: Tensor


def predictives(
    model: Any,
    posterior: artefact.Posterior,
    k: int,
    batch_size: int,
    examples: Examples,
    temperature: float | None = None,
) -> dict[str, Predictions]:
    """Of every predictive the posterior has, and of its MAP at a temperature. Raises PosteriorError where one is not
    finite."""
    f = map_scores(model, examples, batch_size)
    found = {"MAP": point(f)}
    if temperature is not None:
        found[f"MAP, temperature {temperature:.2f}"] = point(f / temperature)
    if posterior.family == "laplace":
        found["linearized"] = linearized(model, posterior.covariance, examples, batch_size)
    found[f"{_available(posterior, k)} particles"] = sampled(model, posterior, k, examples, batch_size)
    for each in found.values():
        check(each.probability)
    return found


def answer_count(examples: Sequence[Example]) -> int:
    """How many answers each row has. Raises PosteriorError where some have more than others."""
    found = {len(example.continuations) for example in examples}
    if len(found) != 1:
        numbers = " or ".join(map(str, sorted(found)))
        raise PosteriorError(f"the rows have {numbers} answers; give those of each number in a file of their own")
    return found.pop()


def map_scores(model: Any, examples: Examples, batch_size: int = ROWS) -> Tensor:
    """Scores [N, C] (float64, CPU) of the active adapter; -inf where a row has fewer answers than another."""
    device = next(model.parameters()).device
    width = max(len(example.continuations) for example in examples)
    result = torch.full((len(examples), width), -math.inf, dtype=torch.float64)
    parts = list(batches(examples, batch_size, tokens=TOKENS))
    with torch.no_grad():
        for indices, batch in tqdm(parts, desc="scoring", unit="batch", leave=False):
            found = scores(model, batch.to(device)).double().cpu()
            result[indices, : found.shape[1]] = found
    return result


def point(scores: Tensor) -> Predictions:
    """Of one theta, by its scores [N, C]: it knows of no epistemic uncertainty."""
    p = scores.softmax(1)
    return Predictions(p, torch.zeros(len(p), dtype=p.dtype), entropy(p))


def linearized(
    model: Any,
    covariance: blockwise.Covariance,
    examples: Examples,
    batch_size: int = ROWS,
) -> Predictions:
    """The posterior predictive under the linearised Laplace covariance at the active adapter."""
    return _stack(each_linearized(model, covariance, examples, batch_size))


def each_linearized(
    model: Any, covariance: blockwise.Covariance, examples: Examples, batch_size: int = ROWS
) -> list[Predictive]:
    """`linearized`, an example at a time."""
    model.eval().requires_grad_(False)
    matrices = lora.matrices(model)
    device = next(model.parameters()).device
    covariance = covariance.to(device)
    found: dict[int, Predictive] = {}
    parts = list(batches(examples, batch_size, tokens=TOKENS))
    for indices, batch in tqdm(parts, desc="linearising", unit="batch", leave=False):
        found.update(zip(indices, linear.predictives(model, matrices, covariance, batch.to(device)), strict=True))
    return [found[index] for index in range(len(examples))]


def sampled(
    model: Any,
    posterior: artefact.Posterior,
    k: int,
    examples: Examples,
    batch_size: int = ROWS,
    seed: int = 0,
) -> Predictions:
    """The posterior predictive of k Laplace samples, or of the k heaviest particles if there are so many; leaves theta
    as it was."""
    return _stack(each_sampled(model, posterior, k, examples, batch_size, seed))


def each_sampled(
    model: Any,
    posterior: artefact.Posterior,
    k: int,
    examples: Examples,
    batch_size: int = ROWS,
    seed: int = 0,
) -> list[Predictive]:
    """`sampled`, an example at a time."""
    k = _available(posterior, k)
    mean = lora.get(model)
    try:
        log_p = []
        for theta in posterior.thetas(k, seed):
            lora.put(model, theta)
            log_p.append(map_scores(model, examples, batch_size).log_softmax(1))
    finally:
        lora.put(model, mean)
    weights = torch.tensor(posterior.mixture(k), dtype=torch.float64)
    return [from_particles(row, weights) for row in _own(torch.stack(log_p, 1), examples)]


def each_map(model: Any, examples: Examples, batch_size: int = ROWS) -> list[Predictive]:
    """Of the active adapter alone."""
    one = torch.ones(1, dtype=torch.float64)
    log_p = map_scores(model, examples, batch_size).log_softmax(1)[:, None]
    return [from_particles(row, one) for row in _own(log_p, examples)]


def _own(log_p: Tensor, examples: Examples) -> list[Tensor]:
    """[K, C] of each example's own answers, from [N, K, C] with room for those of the one that has most."""
    return [row[:, : len(each.continuations)] for row, each in zip(log_p, examples, strict=True)]


def _available(posterior: artefact.Posterior, k: int) -> int:
    return min(k, len(posterior.weights)) if posterior.family == "particles" else k


def _stack(rows: Sequence[Predictive]) -> Predictions:
    epistemic, total = torch.tensor([(row.epistemic, row.total) for row in rows], dtype=torch.float64).T
    probability = torch.nn.utils.rnn.pad_sequence([row.probability for row in rows], batch_first=True)
    return Predictions(probability, epistemic, total)
