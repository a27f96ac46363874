"""`posterior fit`: data (and optionally somebody's PEFT adapter) in, a posterior folder out."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from posterior import artefact, kfac, laplace, lora
from posterior.base import Base, load_model, load_tokenizer, resolve
from posterior.data import Example, batches, data_hash, encode, read_jsonl
from posterior.errors import PosteriorError
from posterior.likelihood import log_likelihood
from posterior.linearized import moments
from posterior.map import Trainer, Training
from posterior.predictive import from_gaussian
from posterior.sketch import Sketch
from posterior.task import Task

# The evidence must not speak before theta* has seen the data: near B = 0 it finds B hardly moved, and chooses a prior
# so tight that B stays there. Until then B's prior is weak.
BURN_IN = 0.5  # share of the training steps
FIRST_PRECISION = 1.0  # of B, during the burn-in; on yelp and SST-2 the evidence then chooses 4 to 14
HELDOUT_FACTORS = tuple(2.0 ** (step / 2) for step in range(-12, 21))  # of the evidence's precision, for held-out NLL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Fit a Laplace posterior over LoRA adapters: MAP, curvature, and the prior by the evidence."
    parser.add_argument(
        "data", help='training rows, JSONL: {"text": ..., "label": 1} for a choice; {"messages": [...]} for text'
    )
    parser.add_argument(
        "--out", required=True, help="the posterior folder to write; its name is the model's name when served"
    )
    parser.add_argument(
        "--task", choices=("choice", "text"), default="choice", help="choice: pick one of some answers; text: write one"
    )
    parser.add_argument(
        "--template",
        default="{text}",
        help=r"how a row becomes a prompt, e.g. '{text}\nSentiment:' (\n is a line break)",
    )
    parser.add_argument(
        "--answers",
        nargs="+",
        help="candidate answers, each with its leading space if it has one: ' negative' ' positive'",
    )
    parser.add_argument("--chat", action="store_true", help="send the prompt through the base's chat template")
    parser.add_argument(
        "--base", help="HF folder, .gguf file or org/name@revision (default: SmolLM2-135M-Instruct from PyPI)"
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        help="Laplace for this trained PEFT adapter instead of training one (data: what it was trained on)",
    )
    group = parser.add_argument_group("LoRA and training")
    group.add_argument("--rank", type=int, default=8, help="rank r of A and B (default %(default)s)")
    group.add_argument("--alpha", type=int, default=16, help="update scale s = alpha / r (default %(default)s)")
    group.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(r) instead")
    group.add_argument(
        "--targets", nargs="+", default=list(lora.DEFAULT_TARGETS), help="module names to adapt (default q_proj v_proj)"
    )
    group.add_argument("--dropout", type=float, default=0.0, help="LoRA dropout while training (default %(default)s)")
    group.add_argument(
        "--learning-rate", type=float, default=1e-3, help="peak of Adam's schedule (default %(default)s)"
    )
    group.add_argument("--epochs", type=int, default=8, help="passes over the data (default %(default)s)")
    group.add_argument("--steps", type=int, help="stop after this many optimiser steps instead")
    group.add_argument("--batch-size", type=int, default=8, help="examples a step (default %(default)s)")
    group.add_argument(
        "--max-length",
        type=int,
        default=1024,
        help="longest row in tokens; longer ones are an error (default %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="fixes initialisation, data order, dropout and sampled labels"
    )
    group = parser.add_argument_group("Laplace")
    group.add_argument(
        "--prior-precision", default="evidence", help="evidence (default), heldout, or a number to hold fixed"
    )
    group.add_argument(
        "--grouping",
        choices=("scalar", "layer"),
        default="scalar",
        help="one prior precision for all B (default), or one for each; A keeps the precision of its initialisation",
    )
    group.add_argument(
        "--no-variational",
        action="store_true",
        help="plain MAP and Laplace: theta* is a mode instead of the mean of a variational Gaussian",
    )
    group.add_argument("--heldout", type=Path, help="rows for --prior-precision heldout, JSONL like the data")
    group.add_argument(
        "--sharing",
        choices=("expand", "reduce"),
        default="expand",
        help="how KFAC treats positions (default %(default)s)",
    )
    group.add_argument(
        "--curvature-rank",
        type=_rank,
        default=32,
        help="keep the large factors in this rank plus an isotropic remainder, or 'whole' (default %(default)s)",
    )
    group.add_argument(
        "--label-samples",
        type=int,
        default=1,
        help="sampled labels a row for a text task's Fisher (default %(default)s)",
    )
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the base's weights (default: bfloat16 on CUDA, else float32)",
    )
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")


def run(args: argparse.Namespace) -> None:
    try:
        posterior = fit(args)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise PosteriorError(
            f"the disk of {args.out} is full; free some space and run the same command again: it goes on from the last "
            "checkpoint, and an older posterior at that place is untouched"
        ) from None
    print(
        f"wrote {posterior.path} ({posterior.name}@{posterior.hash[:12]}); "
        f"try `posterior evaluate {args.out} DATA` or `posterior serve`"
    )


def fit(args: argparse.Namespace) -> artefact.Posterior:
    """Everything from rows to the written folder. Raises PosteriorError for whatever the user can mend."""
    _check(args)
    started = time.monotonic()
    task = Task(
        args.task, args.template.replace("\\n", "\n"), None if args.answers is None else tuple(args.answers), args.chat
    )
    rows = read_jsonl(args.data)
    base = resolve(args.base)
    tokenizer: Any = load_tokenizer(base)
    examples = encode(task, tokenizer, rows, max_length=args.max_length)
    heldout = encode(task, tokenizer, read_jsonl(args.heldout), max_length=args.max_length) if args.heldout else []
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
    out = Path(args.out)
    model = load_model(base, dtype, args.device)
    grouping: laplace.Grouping = args.grouping
    if args.adapter:
        peft_model, origin = _foreign(model, args.adapter)
        gaussian = around(peft_model, origin, examples, args)
    else:
        peft_model = lora.attach(
            model,
            rank=args.rank,
            alpha=args.alpha,
            targets=args.targets,
            dropout=args.dropout,
            rslora=args.rslora,
            seed=args.seed,
            base_id=base.id,
        )
        origin, gaussian = train(peft_model, examples, args, _checkpoint(out), _fingerprint(args, rows, base))
    curvature, precision, coupling = gaussian.curvature, gaussian.precision, gaussian.coupling
    if args.prior_precision == "heldout":
        precision = heldout_precision(peft_model, curvature, precision, heldout, args.batch_size)
    log_lik = log_likelihoods(peft_model, examples, args.batch_size)
    posterior = artefact.save(
        out,
        family="laplace",
        base={"id": base.id, "revision": base.revision, "hash": base.hash},
        task=task,
        lora_config=lora.config_of(peft_model) | {"base_model_name_or_path": base.id},
        prior={
            "A": "mean: " + ("the adapter's own" if args.adapter else "its initialisation") + ", precision 3 d_in",
            "B": "mean: zero",
            "choice": args.prior_precision,
            "grouping": grouping,
            "precision": summary(precision, grouping),
        },
        fit={
            "method": "laplace-kfac",
            "variational": args.task == "choice" and not args.adapter and not args.no_variational,
            "sharing": args.sharing,
            "curvature_rank": args.curvature_rank,
            "coupling": coupling,
            "training": None if args.adapter else asdict(_training(args)),
            "data": {"rows": len(rows), "hash": data_hash(rows)},
            "log_likelihood": log_lik,
            "evidence": laplace.evidence(curvature, distances(peft_model, origin), precision, log_lik, coupling),
            "effective_dimension": sum(
                laplace.effective_dimension(block, precision[name]) for name, block in curvature.items()
            )
            / coupling,
            "seconds": round(time.monotonic() - started, 1),
        },
        mean=lora.get(peft_model),
        curvature=curvature,
        precision=precision,
    )
    shutil.rmtree(_checkpoint(out), ignore_errors=True)
    return posterior


@dataclass(frozen=True)
class Gaussian:
    """The posterior's covariance: P = precision + curvature, the blocks already coupled (see posterior/laplace.py)."""

    curvature: dict[str, kfac.Kronecker]
    precision: laplace.Precision
    coupling: float


def train(
    model: Any, examples: Sequence[Example], args: argparse.Namespace, checkpoint: Path, fingerprint: str
) -> tuple[lora.Theta, Gaussian]:
    """Train the adapter in place; returns the prior's mean and the Gaussian around the trained theta*.

    First the burn-in: MAP under a weak prior. Then epochs of training take turns with updates of the curvature, of the
    prior precision by the evidence (MacKay; Immer et al. 2021) and, for choices, of the posterior covariance S_n of the
    scores. The next epoch's likelihood is its expectation over f_n ~ N(f_n(theta), S_n), which makes theta* the mean of
    a variational Gaussian (Opper & Archambeau 2009) instead of a mode: a mode ignores what the spread costs, lies too
    close to the prior, and leaves a plain Laplace predictive under-confident (Nickisch & Rasmussen 2008). The turns end
    with the epochs, not at convergence: theta* belongs to the covariance of the epoch before the last.
    benchmarks/calibration.py shows what the variational mean buys, and what it does not.
    """
    fixed = _number(args.prior_precision)
    start = _start(lora.get(model), FIRST_PRECISION if fixed is None else fixed)
    trainer = Trainer(model, examples, start, _training(args))
    _resume(trainer, checkpoint, fingerprint)
    gaussian: Gaussian | None = None
    with tqdm(total=trainer.total, initial=trainer.step, desc="training", unit="step") as bar:

        def progress(loss: float) -> None:
            bar.update()
            bar.set_postfix(nll=f"{loss:.3f}")

        while not trainer.done:
            trainer.run_epoch(progress)
            if trainer.step >= BURN_IN * trainer.total:
                gaussian = around(model, trainer.origin, trainer.examples, args, leave=trainer.done)
                trainer.precision = gaussian.precision
                if args.task == "choice" and not args.no_variational and not trainer.done:
                    trainer.examples = spread(model, trainer.examples, gaussian, args.batch_size)
            trainer.save(checkpoint / "state")
            (checkpoint / "fingerprint").write_text(fingerprint, encoding="utf-8")
    return trainer.origin, gaussian or around(model, trainer.origin, trainer.examples, args)


def around(
    model: Any, origin: lora.Theta, examples: Sequence[Example], args: argparse.Namespace, leave: bool = True
) -> Gaussian:
    """The Gaussian around the adapter as it is: curvature, and the prior precision that was asked for."""
    blocks, sketch = measure(model, examples, args, _fixed(origin), leave)
    number = _number(args.prior_precision)
    if number is None:
        moved = distances(model, origin)
        precision, coupling = laplace.settle(blocks, sketch, moved, args.grouping, _fixed(origin))
    else:
        precision = _start(origin, number)
        coupling = laplace.coupling(blocks, precision, sketch.eigenvalues(number))
    return Gaussian(laplace.coupled(blocks, coupling), precision, coupling)


def spread(model: Any, examples: Sequence[Example], gaussian: Gaussian, batch_size: int) -> list[Example]:
    """The examples with the posterior covariance of their scores, S_n = J_n P^-1 J_n^T."""
    matrices = lora.matrices(model)
    device = next(iter(matrices.values())).weight.device
    result = list(examples)
    for indices, batch in batches(examples, batch_size):
        _, (covariance,) = moments(model, matrices, gaussian.curvature, [gaussian.precision], batch.to(device))
        for row, index in enumerate(indices):
            result[index] = replace(examples[index], spread=covariance[row].float().cpu())
    return result


def measure(
    model: Any, examples: Sequence[Example], args: argparse.Namespace, fixed: Mapping[str, float], leave: bool = True
) -> tuple[dict[str, kfac.Kronecker], Sketch]:
    """Kronecker factors over all examples and a sketch of the whole Fisher, with a progress bar."""
    model.eval().requires_grad_(False)
    matrices = lora.matrices(model)
    sketch = Sketch(matrices, fixed, seed=args.seed)
    with tqdm(total=len(examples), desc="curvature", unit="row", leave=leave) as bar:
        blocks = kfac.fit(
            model,
            matrices,
            (batch.to(args.device) for _, batch in batches(examples, args.batch_size)),
            sharing=args.sharing,
            rank=args.curvature_rank,
            samples=args.label_samples,
            seed=args.seed,
            sketch=sketch,
            progress=bar.update,
        )
    return blocks, sketch


def heldout_precision(
    model: Any,
    curvature: laplace.Curvature,
    precision: Mapping[str, float],
    heldout: Sequence[Example],
    batch_size: int,
) -> dict[str, float]:
    """The multiple of `precision` whose linearised predictive has the lowest NLL on held-out rows."""
    choices = [{name: value * factor for name, value in precision.items()} for factor in HELDOUT_FACTORS]
    loss = torch.zeros(len(choices), dtype=torch.float64)
    device = next(iter(lora.matrices(model).values())).weight.device
    for _, batch in batches(heldout, batch_size):
        mean, covariance = moments(model, lora.matrices(model), curvature, choices, batch.to(device))
        for choice in range(len(choices)):
            for row, label in enumerate(batch.label.tolist()):
                loss[choice] -= from_gaussian(mean[row].cpu(), covariance[choice, row].cpu()).probability[label].log()
    return choices[int(loss.argmin())]


def log_likelihoods(model: Any, examples: Sequence[Example], batch_size: int) -> float:
    """log p(D|theta) in nats."""
    device = next(iter(lora.matrices(model).values())).weight.device
    with torch.no_grad():
        return sum(
            float(log_likelihood(model, batch.to(device)).double().sum()) for _, batch in batches(examples, batch_size)
        )


def distances(model: Any, origin: lora.Theta) -> dict[str, float]:
    """|theta - theta_0|^2 of each matrix."""
    theta = lora.get(model)
    return {name: laplace.square_distance(theta, origin, [name]) for name in theta}


def summary(precision: Mapping[str, float], grouping: laplace.Grouping) -> dict[str, float]:
    """One prior precision per group of B matrices, for people to read."""
    names = [name for name in precision if name.endswith(".B")]
    return {group: precision[members[0]] for group, members in laplace.groups(names, grouping).items()}


def _foreign(model: Any, folder: Path) -> tuple[Any, lora.Theta]:
    """Somebody's adapter on the base, and the prior mean we can give it: B = 0, and A where it is (its initialisation
    is not known)."""
    peft_model = lora.load_peft(model, folder)
    theta = lora.get(peft_model)
    return peft_model, {
        name: value if name.endswith(".A") else torch.zeros_like(value) for name, value in theta.items()
    }


def _start(theta: lora.Theta, b: float) -> dict[str, float]:
    """Prior precisions: A's own, and `b` for every B."""
    return dict.fromkeys(theta, b) | _fixed(theta)


def _fixed(theta: lora.Theta) -> dict[str, float]:
    initial = {name: laplace.initial_precision(name, value) for name, value in theta.items()}
    return {name: value for name, value in initial.items() if value is not None}


def _training(args: argparse.Namespace) -> Training:
    return Training(args.learning_rate, args.epochs, args.steps, args.batch_size, args.seed)


def _check(args: argparse.Namespace) -> None:
    number = _number(args.prior_precision)
    if number is None and args.prior_precision not in ("evidence", "heldout"):
        raise PosteriorError(
            f"--prior-precision {args.prior_precision!r} is neither 'evidence', 'heldout' nor a number"
        )
    if number is not None and not (math.isfinite(number) and number > 0):
        raise PosteriorError(f"--prior-precision {number} must be positive; typical values are 1 to 1000")
    if (args.prior_precision == "heldout") != bool(args.heldout):
        raise PosteriorError("--prior-precision heldout and --heldout FILE go together; give both or neither")
    if args.prior_precision == "heldout" and args.task == "text":
        raise PosteriorError("--prior-precision heldout needs a choice task; use the evidence for text")
    for name in ("rank", "epochs", "batch_size", "label_samples", "max_length"):
        if getattr(args, name) < 1:
            raise PosteriorError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")


def _rank(text: str) -> int | None:
    """--curvature-rank: a number, or None for the whole factors."""
    if text in ("whole", "0"):
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a rank nor 'whole'")
    return int(text)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _checkpoint(out: Path) -> Path:
    return out.parent / f".{out.name}.checkpoint"


def _fingerprint(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], base: Base) -> str:
    options = {key: str(value) for key, value in vars(args).items() if key not in ("out", "verb")}
    return hashlib.sha256(
        json.dumps([options, data_hash([dict(row) for row in rows]), base.hash], sort_keys=True).encode()
    ).hexdigest()


def _resume(trainer: Trainer, checkpoint: Path, fingerprint: str) -> None:
    mark = checkpoint / "fingerprint"
    if mark.is_file() and mark.read_text(encoding="utf-8") == fingerprint:
        trainer.resume(checkpoint / "state")
        print(f"resuming from {checkpoint} at step {trainer.step} of {trainer.total}")
