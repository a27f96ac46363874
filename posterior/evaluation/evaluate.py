"""`posterior evaluate`: the MAP beside the posterior on test rows. How often right, how calibrated, and what is not
known."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from posterior.calibration.metrics import Estimate, check, estimate, ood_auroc, sets
from posterior.calibration.records import Temperature
from posterior.cli.arguments import SIZES, add_evaluation, check_device, check_numbers, warn
from posterior.data.examples import ROWS, TOKENS, Example, batches, data_hash, encode
from posterior.data.reading import FORMATS, read_rows
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.evaluation.report import ENTROPIES, START, Report, Source, cells
from posterior.laplace import blockwise
from posterior.laplace import linearized as linear
from posterior.likelihood.scores import scores
from posterior.models import lora
from posterior.models.base import context, load_model, load_tokenizer, resolve
from posterior.predictive.mixture import Predictive, entropy, from_particles
from posterior.storage import artefact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compare the MAP adapter with the posterior predictive on labelled rows of a choice task."
    parser.add_argument("posterior", help="a posterior folder")
    parser.add_argument("data", type=Path, help=f"test rows like the training data: {FORMATS}")
    parser.add_argument(
        "--calibration",
        type=Path,
        help="held-out rows for prediction sets, and for a temperature of the MAP, shown as a baseline",
    )
    parser.add_argument(
        "--ood", type=Path, help="rows of another kind (labels are not read): does entropy tell them from DATA's?"
    )
    parser.add_argument(
        "--particles",
        type=int,
        default=8,
        help="of the sampled predictive, or all in the folder if it has fewer (default %(default)s)",
    )
    parser.add_argument("--report", type=Path, metavar="HTML", help="also write one page with tables and plots")
    add_evaluation(parser)


def run(args: argparse.Namespace) -> None:
    if args.report:
        _check_report(args.report)
    report = evaluate(args)
    if args.report:
        report.save(args.report)
    if args.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        print("\n\n".join(map(_markdown, report.tables())))


def _check_report(path: Path) -> None:
    """Raises PosteriorError unless a page may be written there: nothing is there, or an empty file, or such a page."""
    if path.is_dir():
        raise PosteriorError(f"--report {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise PosteriorError(f"--report {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PosteriorError(f"--report {path}: you may not write into {path.parent}; name another folder")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise PosteriorError(f"--report {path} is no regular file; nothing was touched: name another")
    if path.exists():
        with path.open("rb") as file:
            start = file.read(len(START))
        if start not in (b"", START):
            raise PosteriorError(
                f"--report {path} holds something else than a report; nothing was touched: name another"
            )


def evaluate(args: argparse.Namespace) -> Report:
    """What is known of the posterior on these rows. Raises PosteriorError for whatever the user can mend."""
    check_numbers(args, SIZES)
    check_device(args.device)
    posterior = artefact.load(args.posterior)
    if posterior.task.kind != "choice":
        raise PosteriorError(f"{posterior.name!r} is a text posterior; evaluate compares candidate answers")
    base = resolve(args.base or base_spec(posterior.base))
    posterior.check_base(base.hash)
    read = partial(Rows.read, posterior.task, load_tokenizer(base), context(base))
    test = read(args.data)
    held = read(args.calibration) if args.calibration else None
    ood = read(args.ood, labels=False) if args.ood else None
    again = test.repeated(held) if held else 0
    if again:
        warn(f"{again} of {len(test.y)} test rows are in --calibration too, where temperature and sets look too good")
    seen = posterior.trained_on(test.examples)
    if seen:
        warn(f"{seen} of {len(test.y)} test rows are rows that {posterior.name!r} was fitted on; others are harder")
    model = lora.load_peft(load_model(base, getattr(torch, args.dtype), args.device), posterior.map_dir).eval()
    predict = partial(predictives, model, posterior, args.particles, args.batch_size)
    at_held = predict(held.examples) if held else {}
    temperature = Temperature.fit(at_held["MAP"].probability, held.y).temperature if held else None
    at_test = predict(test.examples, temperature)
    at_ood = predict(ood.examples, temperature) if ood else {}
    return Report(
        posterior={"name": posterior.name, "hash": posterior.hash, "family": posterior.family},
        base=posterior.base,
        data=test.source,
        calibration=held.source if held else None,
        repeated=again,
        ood=ood.source if ood else None,
        table={name: estimate(each.probability, test.y) for name, each in at_test.items()},
        sets={}
        if held is None
        else {
            name: sets(each.probability, held.y, at_test[name].probability, test.y) for name, each in at_held.items()
        },
        ood_auroc={
            name: {kind: ood_auroc(getattr(at_test[name], kind), getattr(each, kind)) for kind in ENTROPIES}
            for name, each in at_ood.items()
        },
        curves={name: (each.probability, test.y) for name, each in at_test.items()},
        fit=posterior.fit,
    )


@dataclass(frozen=True)
class Rows:
    """A file of rows: where they are from, as examples, and their labels [N]."""

    source: Source
    examples: list[Example]
    y: Tensor

    @classmethod
    def read(cls, task: Task, tokenizer: Any, longest: int, path: Path, labels: bool = True) -> Rows:
        """Of the file at `path`, whose rows may have `longest` tokens, the base's context. Raises PosteriorError."""
        rows = read_rows(path)
        asked = rows if labels else [row | {"label": 0} for row in rows]
        limit = f"the base's context of {longest}"
        examples = encode(task, tokenizer, asked, longest=longest, limit=limit, source=path)
        y = torch.tensor([example.label for example in examples])
        return cls(Source(path.name, data_hash(rows), len(rows)), examples, y)

    def repeated(self, others: Rows) -> int:
        """How many of these are in `others` too: the same prompt with the same answers."""
        known = {(example.prompt, example.continuations) for example in others.examples}
        return sum((example.prompt, example.continuations) in known for example in self.examples)


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
    examples: Sequence[Example],
    temperature: float | None = None,
) -> dict[str, Predictions]:
    """Of every predictive the posterior has, and of its MAP at a temperature. Raises PosteriorError where one is not
    finite."""
    f = map_scores(model, examples, batch_size)
    found = {"MAP": point(f)}
    if temperature is not None:
        found[f"MAP, temperature {temperature:.2f}"] = point(f / temperature)
    if posterior.family == "laplace":
        found["linearized"] = linearized(model, posterior.law, examples, batch_size)
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


def map_scores(model: Any, examples: Sequence[Example], batch_size: int = ROWS) -> Tensor:
    """Scores [N, C] (float64, CPU) of the active adapter. Raises PosteriorError like `answer_count`."""
    device = next(model.parameters()).device
    result = torch.zeros(len(examples), answer_count(examples), dtype=torch.float64)
    parts = list(batches(examples, batch_size, tokens=TOKENS))
    with torch.no_grad():
        for indices, batch in tqdm(parts, desc="scoring", unit="batch", leave=False):
            result[indices] = scores(model, batch.to(device)).double().cpu()
    return result


def point(scores: Tensor) -> Predictions:
    """Of one theta, by its scores [N, C]: it knows of no epistemic uncertainty."""
    p = scores.softmax(1)
    return Predictions(p, torch.zeros(len(p), dtype=p.dtype), entropy(p))


def linearized(
    model: Any,
    law: blockwise.Law,
    examples: Sequence[Example],
    batch_size: int = ROWS,
) -> Predictions:
    """The posterior predictive under the linearised Laplace covariance at the active adapter."""
    model.eval().requires_grad_(False)
    matrices = lora.matrices(model)
    device = next(model.parameters()).device
    law = law.to(device)
    found: dict[int, Predictive] = {}
    parts = list(batches(examples, batch_size, tokens=TOKENS))
    for indices, batch in tqdm(parts, desc="linearising", unit="batch", leave=False):
        found.update(zip(indices, linear.predictives(model, matrices, law, batch.to(device)), strict=True))
    return _stack([found[index] for index in range(len(examples))])


def sampled(
    model: Any,
    posterior: artefact.Posterior,
    k: int,
    examples: Sequence[Example],
    batch_size: int = ROWS,
    seed: int = 0,
) -> Predictions:
    """The posterior predictive of k Laplace samples, or of the k heaviest particles if there are so many; leaves theta
    as it was."""
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
    return _stack([from_particles(row, weights) for row in torch.stack(log_p, 1)])


def _available(posterior: artefact.Posterior, k: int) -> int:
    return min(k, len(posterior.weights)) if posterior.family == "particles" else k


def _stack(rows: Sequence[Predictive]) -> Predictions:
    epistemic, total = torch.tensor([(row.epistemic, row.total) for row in rows], dtype=torch.float64).T
    return Predictions(torch.stack([row.probability for row in rows]), epistemic, total)


def markdown(table: Mapping[str, Mapping[str, Estimate]], rows: int) -> str:
    """A Markdown table: methods x metrics, with 95 % bootstrap intervals."""
    return _markdown(cells(table, rows))


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([head, "|---" * len(table[0]) + "|", *rows])


def base_spec(base: Mapping[str, Any]) -> str | None:
    """How to find the base a posterior was fitted on: a hub id needs its revision, at_ood names stand alone."""
    return f"{base['id']}@{base['revision']}" if "/" in str(base["id"]) and base["revision"] else base["id"]
