"""Does `make fit` still make the posterior that ships? Two posterior folders beside each other.

    python -m benchmarks.fit_check posterior/shipped/sentiment AGAIN      (make fit-check fits AGAIN, and runs this)

Both answer the first test rows in float32, by the mean alone and by the linearised predictive. Sums in another order,
on other processors and numbers of threads, change a fit a little; another method, other data or another base more.
Exits with 1 where a difference is larger than its tolerance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posterior.calibration.metrics import nll
from posterior.data.examples import Examples, encode
from posterior.data.reading import read_rows
from posterior.evaluation.predictions import linearized, map_scores
from posterior.models import lora
from posterior.models.base import Base, load_model, load_tokenizer, resolve
from posterior.storage import artefact

TEST = Path(__file__).parent / "data" / "yelp.test.jsonl"


@dataclass(frozen=True)
class Comparison:
    """Two numbers and how far apart they may be; `relative`: to the first."""

    name: str
    shipped: float
    again: float
    tolerance: float
    relative: bool = False

    @property
    def difference(self) -> float:
        return abs(self.again - self.shipped) / (abs(self.shipped) if self.relative else 1.0)

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance  # False of what is not a number, too

    def __str__(self) -> str:
        unit = " of it" if self.relative else ""
        return (
            f"| {self.name} | {self.shipped:.4g} | {self.again:.4g} | {self.difference:.2g}{unit} | "
            f"{self.tolerance:g}{unit} | {'yes' if self.holds else 'NO'} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shipped", type=Path)
    parser.add_argument("again", type=Path)
    parser.add_argument("--rows", type=int, default=128, help="test rows (default %(default)s)")
    args = parser.parse_args()
    posteriors = [artefact.load(folder) for folder in (args.shipped, args.again)]
    base = resolve()
    tokenizer: Any = load_tokenizer(base)
    examples = encode(posteriors[0].task, tokenizer, read_rows(TEST)[: args.rows])
    answers = [probabilities(base, posterior, examples) for posterior in posteriors]
    found = list(compare(posteriors, answers, torch.tensor([example.label for example in examples])))
    same = "the same" if posteriors[0].hash == posteriors[1].hash else "another"
    print(f"{len(examples)} test rows; the hash is {same}\n")
    print("| | shipped | again | difference | tolerance | holds |\n|---|---|---|---|---|---|")
    print("\n".join(map(str, found)))
    sys.exit(not all(each.holds for each in found))


def probabilities(base: Base, posterior: artefact.Posterior, examples: Examples) -> dict[str, Tensor]:
    """[N, C] of each predictive."""
    posterior.check_base(base.hash)
    model = lora.load_peft(load_model(base, torch.float32, "cpu"), posterior.map_dir).eval().requires_grad_(False)
    return {
        "mean alone": map_scores(model, examples).softmax(1),
        "linearised": linearized(model, posterior.covariance, examples).probability,
    }


def compare(posteriors: list[artefact.Posterior], answers: list[dict[str, Tensor]], y: Tensor) -> Iterator[Comparison]:
    """What is compared, and by how much it may differ."""
    first, second = posteriors
    for name in answers[0]:
        apart = (answers[1][name] - answers[0][name]).abs()
        yield Comparison(f"{name}: NLL", nll(answers[0][name], y), nll(answers[1][name], y), 0.02)
        yield Comparison(f"{name}: mean distance of probabilities", 0.0, float(apart.mean()), 0.02)
        changed = (answers[1][name].argmax(1) != answers[0][name].argmax(1)).double().mean()
        yield Comparison(f"{name}: share of answers that change", 0.0, float(changed), 0.03)
    for name, precision in first.prior["precision"].items():
        yield Comparison(f"prior precision, {name}", precision, second.prior["precision"][name], 0.05, relative=True)
    yield Comparison("log evidence, nats", first.fit["evidence"], second.fit["evidence"], 5.0)
    yield Comparison(
        "effective dimension", first.fit["effective_dimension"], second.fit["effective_dimension"], 0.05, relative=True
    )
    yield Comparison("width of draws", first.width, second.width, 0.1)


if __name__ == "__main__":
    main()
