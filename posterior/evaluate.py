"""`posterior evaluate`: the MAP beside the posterior on test rows, in accuracy, NLL, Brier, ECE and signed gap."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from posterior import artefact, lora
from posterior.arguments import add_evaluation
from posterior.base import load_model, load_tokenizer, resolve
from posterior.data import Example, batches, encode, read_jsonl
from posterior.errors import PosteriorError
from posterior.kfac import Kronecker
from posterior.likelihood import scores
from posterior.linearized import moments
from posterior.metrics import METRICS, Estimate, best_temperature, estimate
from posterior.predictive import from_gaussian, from_particles


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compare the MAP adapter with the posterior predictive on labelled rows of a choice task."
    parser.add_argument("posterior", help="a posterior folder")
    parser.add_argument("data", help="test rows, JSONL, like the training data")
    parser.add_argument("--calibration", type=Path, help="held-out rows to fit a temperature on, shown as a baseline")
    parser.add_argument(
        "--particles", type=int, default=8, help="particles of the sampled predictive (default %(default)s)"
    )
    add_evaluation(parser)


def run(args: argparse.Namespace) -> None:
    posterior = artefact.load(args.posterior)
    if posterior.task.kind != "choice":
        raise PosteriorError(f"{posterior.name!r} is a text posterior; evaluate compares candidate answers")
    spec = args.base or base_spec(posterior.base)
    base = resolve(spec)
    posterior.check_base(base.hash)
    tokenizer: Any = load_tokenizer(base)
    test = encode(posterior.task, tokenizer, read_jsonl(args.data))
    labels = torch.tensor([example.label for example in test])
    model = lora.load_peft(load_model(base, getattr(torch, args.dtype), args.device), posterior.map_dir).eval()
    f = map_scores(model, test, args.batch_size)
    table = {"MAP": estimate(f.softmax(1), labels)}
    if args.calibration:
        rows = encode(posterior.task, tokenizer, read_jsonl(args.calibration))
        temperature = best_temperature(
            map_scores(model, rows, args.batch_size), torch.tensor([row.label for row in rows])
        )
        table[f"MAP, temperature {temperature:.2f}"] = estimate((f / temperature).softmax(1), labels)
    if posterior.family == "laplace":
        table["linearized"] = estimate(
            linearized(model, posterior.curvature, posterior.precision, test, args.batch_size), labels
        )
    table[f"{args.particles} particles"] = estimate(
        sampled(model, posterior, args.particles, test, args.batch_size), labels
    )
    print(json.dumps(as_json(table)) if args.json else markdown(table, len(test)))


def map_scores(model: Any, examples: Sequence[Example], batch_size: int = 32) -> Tensor:
    """Scores [N, C] (float64, CPU) of the active adapter; all rows must have the same number of answers."""
    if len({len(example.continuations) for example in examples}) != 1:
        raise PosteriorError("the rows have different numbers of answers; evaluate them in separate files")
    device = next(model.parameters()).device
    result = torch.zeros(len(examples), len(examples[0].continuations), dtype=torch.float64)
    with torch.no_grad():
        for indices, batch in tqdm(list(batches(examples, batch_size)), desc="scoring", unit="batch", leave=False):
            result[indices] = scores(model, batch.to(device)).double().cpu()
    return result


def linearized(
    model: Any,
    curvature: Mapping[str, Kronecker],
    precision: Mapping[str, float],
    examples: Sequence[Example],
    batch_size: int = 32,
) -> Tensor:
    """Posterior predictive probabilities [N, C] under the linearised Laplace covariance at the active adapter."""
    model.eval().requires_grad_(False)
    matrices = lora.matrices(model)
    device = next(model.parameters()).device
    result = torch.zeros(len(examples), len(examples[0].continuations), dtype=torch.float64)
    for indices, batch in tqdm(list(batches(examples, batch_size)), desc="linearising", unit="batch", leave=False):
        mean, (covariance,) = moments(model, matrices, curvature, [precision], batch.to(device))
        for row, index in enumerate(indices):
            result[index] = from_gaussian(mean[row].cpu(), covariance[row].cpu()).probability
    return result


def sampled(
    model: Any, posterior: artefact.Posterior, k: int, examples: Sequence[Example], batch_size: int = 32, seed: int = 0
) -> Tensor:
    """Posterior predictive probabilities [N, C] of k particles; leaves theta as it was."""
    mean = lora.get(model)
    with tempfile.TemporaryDirectory() as scratch:
        particles = [lora.read_adapter(folder) for folder in posterior.adapters(k, Path(scratch), seed)]
    try:
        log_p = []
        for theta in particles:
            lora.put(model, theta)
            log_p.append(map_scores(model, examples, batch_size).log_softmax(1))
    finally:
        lora.put(model, mean)
    weights = torch.tensor(posterior.weights[:k] or [1.0] * k, dtype=torch.float64)
    stacked = torch.stack(log_p, 1)
    return torch.stack([from_particles(row, weights).probability for row in stacked])


def markdown(table: Mapping[str, Mapping[str, Estimate]], rows: int) -> str:
    """A Markdown table: methods x metrics, with 95 % bootstrap intervals."""
    lines = [f"| {rows} rows | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    lines += [
        f"| {method} | " + " | ".join(str(estimates[name]) for name in METRICS) + " |"
        for method, estimates in table.items()
    ]
    return "\n".join(lines)


def as_json(table: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    return {method: {name: asdict(value) for name, value in estimates.items()} for method, estimates in table.items()}


def base_spec(base: Mapping[str, Any]) -> str | None:
    """How to find the base a posterior was fitted on: a hub id needs its revision, other names stand alone."""
    return f"{base['id']}@{base['revision']}" if "/" in str(base["id"]) and base["revision"] else base["id"]
