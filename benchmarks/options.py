"""Many options: what the estimated Fisher and the gradients of the likely options alone cost, and what they change.

    python -m benchmarks.options --data FOLDER        FOLDER has banking77/{train,test}.jsonl (CC BY 4.0, PolyAI)

The 77 intents of banking77 as candidates of one token each (a token of the intent's name that no other intent has), so
that the exact answer can be had: 76 backward passes a batch. One adapter is trained; around it, at one prior precision,
the Fisher of the training rows is computed exactly, by `kfac.few`, and by as many labels sampled from the model. The
linearised predictive of test rows is computed with each Fisher, and, with the exact one, from the gradients of fewer
options. `departments` are the 8 departments of the same rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import posterior
from posterior import Ensemble, Task
from posterior.calibration.metrics import nll
from posterior.curvature import kfac
from posterior.curvature.sketch import Full, Sketch
from posterior.data.examples import Examples, batches, encode
from posterior.data.reading import Row, read_rows
from posterior.evaluation.predictions import map_scores
from posterior.evaluation.report import markdown_rows
from posterior.laplace import linearized as linear
from posterior.laplace.gaussian import fixed_precision
from posterior.likelihood import directions
from posterior.models import lora
from posterior.models.base import load_model, load_tokenizer, resolve
from posterior.predictive.mixture import from_gaussian

PRECISION = 10.0  # of B
BATCH = 8
TEMPLATE = "{text}\nTopic:"
COLUMNS, FEW = kfac.fisher_columns, kfac.few
Columns = Callable[[Tensor, torch.Generator], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77/{train,test}.jsonl")
    parser.add_argument("--train-rows", type=int, default=512, help="that the adapter sees (default %(default)s)")
    parser.add_argument("--rows", type=int, default=64, help="of the Fisher (default %(default)s)")
    parser.add_argument("--test-rows", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    train, test = (read_rows(args.data / "banking77" / f"{part}.jsonl") for part in ("train", "test"))
    generator = torch.Generator().manual_seed(0)
    train, test = ([part[i] for i in torch.randperm(len(part), generator=generator).tolist()] for part in (train, test))
    for field in ("department", "intent"):
        report(field, train[: args.train_rows], test[: args.test_rows], args)


def report(field: str, train: list[Row], test: list[Row], args: argparse.Namespace) -> None:
    """The tables of one way to label the rows."""
    tokenizer = load_tokenizer(resolve())
    words = tokens_of(tokenizer, sorted({row[field] for row in train + test}))
    task = Task("choice", TEMPLATE, tuple(words.values()))
    rows = [[{"text": row["text"], "label": words[row[field]]} for row in part] for part in (train, test)]
    found = posterior.fit(rows[0], task=task, method=Ensemble(particles=1, epochs=args.epochs))
    model = lora.load_peft(load_model(resolve(), torch.float32, "cpu"), found.path / "map", name=lora.ADAPTER)
    model.eval().requires_grad_(False)
    seen, asked = (encode(task, tokenizer, part) for part in (rows[0][: args.rows], rows[1]))
    labels = torch.tensor([row.label for row in asked])
    print(f"\n{field}: {len(words)} options, NLL of the MAP {nll(map_scores(model, asked).softmax(1), labels):.3f}\n")

    fishers: dict[str, Columns] = {"exact": lambda f, _: COLUMNS(f), "estimated": estimated, "sampled labels": sampled}
    covariances, table = {}, []
    for name, columns in fishers.items():
        start = time.monotonic()
        gram, covariances[name] = fisher(model, seen, columns)
        table.append([name, gram, time.monotonic() - start])
    reference, slowest = table[0][1], table[0][2]
    predicted = {name: predict(model, asked, each, directions.MOST)[0] for name, each in covariances.items()}
    lines = [
        [
            name,
            f"{float((gram - reference).norm() / reference.norm()):.3f}",
            f"{float(gram.trace() / reference.trace()):.3f}",
            f"{float((predicted[name] - predicted['exact']).abs().sum(1).mean()) / 2:.4f}",
            f"{nll(predicted[name], labels):.4f}",
            f"{slowest / seconds:.1f}",
        ]
        for name, gram, seconds in table
    ]
    heading = ["Fisher", "relative distance", "trace / exact", "total variation", "NLL", "times as fast"]
    print(markdown_rows([heading, *lines]) + "\n")

    lines = []
    whole, slowest = predict(model, asked, covariances["exact"], len(words))
    for most in (len(words), 16, 8, 4):
        p, seconds = (whole, slowest) if most == len(words) else predict(model, asked, covariances["exact"], most)
        variation = (p - whole).abs().sum(1) / 2
        lines.append(
            [
                str(most),
                f"{float(variation.mean()):.4f}",
                f"{float(variation.max()):.4f}",
                f"{nll(p, labels):.4f}",
                f"{slowest / seconds:.1f}",
                f"{1000 * seconds / len(asked):.0f}",
            ]
        )
    heading = ["gradients, at most", "total variation", "largest", "NLL", "times as fast", "ms a row"]
    print(markdown_rows([heading, *lines]), flush=True)


def tokens_of(tokenizer: Any, names: list[str]) -> dict[str, str]:
    """For each name one of its tokens, with a space before it, that no other has."""
    found: dict[str, str] = {}
    for name in names:
        each = [tokenizer.decode([token]) for token in tokenizer.encode(" " + name.replace("_", " "))]
        words = [f" {word.strip()}" for word in each] + [f" {chr(code)}" for code in range(ord("A"), ord("z"))]
        single = (word for word in words if len(tokenizer.encode(word)) == 1)
        found[name] = next(word for word in single if word not in found.values())
    return found


def estimated(f: Tensor, generator: torch.Generator) -> Tensor:
    """What a fit uses."""
    return FEW(COLUMNS(f), generator)


def sampled(f: Tensor, generator: torch.Generator) -> Tensor:
    """Labels drawn from the model, as many as `kfac.few` has columns: e_y - p, of f [B, 1, C]."""
    p, count = f[:, 0].softmax(1), directions.EXACT - 1
    labels = torch.multinomial(p.double(), count, replacement=True, generator=generator)
    drawn = torch.nn.functional.one_hot(labels, p.shape[1]).to(p)
    return (drawn - p[:, None]).mT / count**0.5


def fisher(model: Any, examples: Examples, columns: Columns) -> tuple[Tensor, Full]:
    """The sketched Gram matrix, and the covariance that it leaves at PRECISION."""
    matrices, generator = lora.matrices(model), torch.Generator().manual_seed(0)
    sketch = Sketch(matrices, fixed_precision(lora.get(model)))
    with (
        patch.object(kfac, "fisher_columns", lambda f: columns(f, generator)),
        patch.object(kfac, "few", lambda found, _generator: found),
    ):
        kfac.fit(model, matrices, (batch for _, batch in batches(examples, BATCH)), rank=32, sketch=sketch)
    return sketch.gram, sketch.full(PRECISION)


def predict(model: Any, examples: Examples, covariance: Full, most: int) -> tuple[Tensor, float]:
    """Probabilities [N, C] of the linearised predictive with gradients for `most` options, and the seconds it took."""
    found = torch.zeros(len(examples), len(examples[0].continuations), dtype=torch.float64)
    everything = most == found.shape[1]
    start = time.monotonic()
    with (
        patch.object(directions, "EXACT", most if everything else directions.EXACT),
        patch.object(directions, "MOST", most),
    ):
        for indices, batch in batches(examples, BATCH):
            mean, (spread,) = linear.moments(model, lora.matrices(model), covariance, batch)
            for index, f, each in zip(indices, mean, spread, strict=True):
                found[index] = from_gaussian(f, each).probability
    return found, time.monotonic() - start


if __name__ == "__main__":
    main()
