"""Does P(right) tell right answers from wrong ones? Open questions, answered by a posterior and by its MAP alone.

    python -m benchmarks.answers --posterior posteriors/answers --minutes 60  writes cells that are missing, then tables
    python -m benchmarks.answers --posterior posteriors/answers --minutes 0   only the tables; with --embedding FOLDER,
                                                                              also by that model's meanings

`make answers` makes the posterior; benchmarks/questions.py says which rows it, the calibration and the test have. A
row's cell is a line in benchmarks/results/answers-{mixture,map}.jsonl: the
greedy text and n samples, with what each particle says of them. It is written once, so that the rows take as many runs
as it takes; a cell of another posterior or other settings is not used. An answer is right if it matches an accepted one
(posterior/meaning/grades.py).

Estimators of one adapter (the MAP, with as many samples): length-normalised and summed log-probability, token entropy,
the share of samples that mean the same, semantic entropy. Ours, of the posterior: the same of the mixture, the
epistemic parts, and P(right). Every estimator is judged on the greedy text of its own law. Differences are paired over
questions.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.cells import DATA, RESULTS
from benchmarks.engines import wait_passively
from posterior.calibration.metrics import RESAMPLES, RIGHT_METRICS, estimate, right_auroc
from posterior.calibration.rightness import PLAIN, SAMPLED, Feature, Features, Model
from posterior.data.examples import data_hash
from posterior.data.graded import GradedRow, encode
from posterior.data.reading import read_rows
from posterior.evaluation.report import markdown_rows
from posterior.meaning import Grouping
from posterior.meaning.embedding import Embedding
from posterior.meaning.exact import exact
from posterior.meaning.grades import match
from posterior.meaning.greedy import grouped
from posterior.models.base import load_tokenizer, resolve
from posterior.predictive.meanings import meanings
from posterior.storage import artefact
from posterior.storage.artefact import Posterior
from server.calibrate.observing import AT_ONCE, Written, features_of, write
from server.calibrate.settings import TextCalibration
from server.calibrate.verb import started

Law = Literal["mixture", "map"]
LAWS: tuple[Law, ...] = ("mixture", "map")
ROUGHLY = 2 * AT_ONCE  # rows between two looks at the clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True, help="that of `make answers`")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--rows", type=int, help="of each part, at most")
    parser.add_argument("--minutes", type=float, default=60, help="for cells that are missing")
    parser.add_argument("--embedding", type=Path, help="a folder of sentence-transformers that tells meanings apart")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wait_passively("benchmarks.answers")
    posterior = artefact.load(args.posterior)
    parts = {name: read_rows(DATA / f"answers.{name}.jsonl")[: args.rows] for name in ("calibration", "test")}
    tokenizer = load_tokenizer(resolve(posterior.base_spec))
    graded = {name: encode(posterior.task, tokenizer, rows) for name, rows in parts.items()}
    deadline = time.monotonic() + 60 * args.minutes
    cells: dict[Law, dict[str, list[Cell]]] = {}
    for law in LAWS:
        settings = TextCalibration(
            predictive=law, samples=args.samples, max_tokens=args.max_tokens, stop=("\n",), seed=args.seed
        )
        cells[law] = collect(posterior, law, graded, settings, deadline)
    groupings: dict[str, Grouping] = {"exact": exact}
    if args.embedding is not None:
        compare = Embedding(args.embedding)
        groupings["embedding"] = lambda texts: grouped("", texts, compare)
    for name, grouping in groupings.items():
        print(f"{posterior.name}@{posterior.hash[:12]}, {args.samples} samples, meaning {name}, seed {args.seed}\n")
        report(cells, grouping)


# Cells


class Cell(NamedTuple):
    """One question under one law: the greedy text, its features without samples, the samples' texts in the order of
    drawing and log p_k of each [n, K], and the log-weights [K]; accepted: the answers."""

    text: str
    features: Features
    samples: list[str]
    log_p: Tensor
    log_weights: Tensor
    accepted: tuple[str, ...]

    @property
    def right(self) -> bool:
        return match(self.text, self.accepted)

    def first(self, count: int) -> Cell:
        """With the first samples alone."""
        return self._replace(samples=self.samples[:count], log_p=self.log_p[:count])

    def full(self, grouping: Grouping) -> Features:
        """The features with those of the samples' meanings."""
        groups = grouping([*self.samples, self.text])
        found = meanings(self.log_p, self.log_weights, groups[:-1])
        same = [int(found.group[i]) for i, group in enumerate(groups[:-1]) if group == groups[-1]]
        own = float(found.predictive.probability[same[0]]) if same else 0.0
        p = found.predictive
        more: dict[Feature, float] = {
            "semantic_entropy": p.total,
            "semantic_epistemic": p.epistemic,
            "largest_meaning": float(p.probability[0]),
            "own_meaning": own,
        }
        return {**self.features, **more}


def collect(
    posterior: Posterior,
    law: Law,
    parts: Mapping[str, Sequence[GradedRow]],
    settings: TextCalibration,
    deadline: float,
) -> dict[str, list[Cell]]:
    """The cells of each part: those on file, and what can be written until the deadline."""
    path = RESULTS / f"answers-{law}.jsonl"
    made = f"{posterior.hash[:16]} {settings}"
    known = {line["key"]: line for line in _lines(path) if line["made"] == made}
    keys = {name: [data_hash([{"prompt": row.question}]) for row in rows] for name, rows in parts.items()}
    missing = [
        (key, row)
        for name, rows in parts.items()
        for key, row in zip(keys[name], rows, strict=True)
        if key not in known
    ]
    if missing and time.monotonic() < deadline:
        for line in asyncio.run(_written(posterior, missing, settings, deadline)):
            known[line["key"]] = {**line, "made": made}
        _save(path, list(known.values()))
    return {
        name: [_cell(known[key], row) for key, row in zip(keys[name], rows, strict=True) if key in known]
        for name, rows in parts.items()
    }


async def _written(
    posterior: Posterior, missing: Sequence[tuple[str, GradedRow]], settings: TextCalibration, deadline: float
) -> list[dict[str, Any]]:
    """Lines of the rows that could be written until the deadline."""
    found: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        service = await started(posterior, None, settings, stack)
        served = service.find(posterior.name)
        progress = stack.enter_context(tqdm(total=len(missing), desc=settings.predictive, unit="row"))
        for start in range(0, len(missing), ROUGHLY):
            if time.monotonic() > deadline:
                break
            part = missing[start : start + ROUGHLY]
            each = await asyncio.gather(*(write(service, served, row, settings) for _, row in part))
            found += [_line(key, one) for (key, _), one in zip(part, each, strict=True)]
            progress.update(len(part))
    return found


def _line(key: str, found: Written) -> dict[str, Any]:
    assert found.samples is not None
    drawn = torch.tensor(found.samples.numbers).argsort()
    return {
        "key": key,
        "text": found.text,
        "features": dict(features_of(found.trace, 0)),
        "samples": [found.samples.texts[index] for index in drawn.tolist()],
        "log_p": [[round(value, 6) for value in row] for row in found.samples.log_p[drawn].tolist()],
        "log_weights": found.samples.log_weights.tolist(),
    }


def _cell(line: Mapping[str, Any], row: GradedRow) -> Cell:
    log_p, log_weights = (torch.tensor(line[name], dtype=torch.float64) for name in ("log_p", "log_weights"))
    return Cell(line["text"], line["features"], line["samples"], log_p, log_weights, row.accepted or ())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def _save(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    work = path.with_suffix(".work")
    work.write_text("".join(json.dumps(line) + "\n" for line in lines))
    work.replace(path)


def dirichlet_entropy(counts: Tensor) -> float:
    """The posterior mean of an entropy in nats: of a Dirichlet(1/2) prior over the meanings that were seen and one that
    was not (Wolpert & Wolf 1995), as Ciosek et al. 2025 (arXiv 2504.03579) do for few samples, here without their
    bound by the texts' probabilities."""
    alpha = torch.cat([counts.double(), torch.zeros(1, dtype=torch.float64)]) + 0.5
    whole = alpha.sum()
    return float((whole + 1).digamma() - (alpha / whole * (alpha + 1).digamma()).sum())


# Tables


class Judged(NamedTuple):
    """What an estimator says of the test's texts [N], the larger the surer, and which of them are right [N]."""

    score: Tensor
    right: Tensor


BY_FEATURE: Mapping[str, Callable[[Features], float]] = {
    "length-normalised log-probability": lambda f: f["mean_logprob"],
    "summed log-probability": lambda f: f["logprob"],
    "token entropy": lambda f: -f["entropy"],
    "p(meaning)": lambda f: f["own_meaning"],
    "semantic entropy": lambda f: -f["semantic_entropy"],
}
EPISTEMIC: Mapping[str, Callable[[Features], float]] = {
    "epistemic entropy of tokens": lambda f: -f["epistemic"],
    "epistemic semantic entropy": lambda f: -f["semantic_epistemic"],
}


def report(cells: Mapping[Law, Mapping[str, Sequence[Cell]]], grouping: Grouping) -> None:
    """Print the tables, with meanings told apart by the grouping."""
    found: dict[str, Judged] = {}
    for law in LAWS:
        test, held = cells[law]["test"], cells[law]["calibration"]
        print(f"{law}: {len(held)} rows to calibrate, {len(test)} to test")
        if not test or not held:
            print("not all has been written; run it again")
            return
        full = [cell.full(grouping) for cell in test]
        right = torch.tensor([cell.right for cell in test])
        for name, score in {**BY_FEATURE, **(EPISTEMIC if law == "mixture" else {})}.items():
            found[f"{law}: {name}"] = Judged(torch.tensor([score(each) for each in full], dtype=torch.float64), right)
        for names, called in ((PLAIN, "P(right), without samples"), (SAMPLED, "P(right)")):
            found[f"{law}: {called}"] = Judged(_p_right(names, held, full, grouping), right)
    singles = [name for name in found if name.startswith("map: ") and "P(right)" not in name]
    best = max(singles, key=lambda name: right_auroc(*found[name]))
    print(f"\n{ranking(found, best)}\n\n{calibration(found)}\n\n{enough(cells['mixture'], grouping)}\n")


def _p_right(names: Sequence[Feature], held: Sequence[Cell], test: Sequence[Features], grouping: Grouping) -> Tensor:
    """P(right) of the test's texts, learnt from the rows that calibrate."""
    rows = [cell.full(grouping) for cell in held]
    x = torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64)
    model = Model.fit(names, x, torch.tensor([cell.right for cell in held]))
    return model(model.table(test))


def enough(cells: Mapping[str, Sequence[Cell]], grouping: Grouping) -> str:
    """AUROC of the mixture's text being right, by the number of samples."""
    most = len(cells["test"][0].samples)
    rows = [["samples", "p(meaning)", "semantic entropy", "the same, Bayesian", "P(right)"]]
    for count in [n for n in (2, 4, 8, 16, 32) if n <= most]:
        test, held = ([cell.first(count) for cell in cells[part]] for part in ("test", "calibration"))
        full = [cell.full(grouping) for cell in test]
        right = torch.tensor([cell.right for cell in test])
        bayes = [-dirichlet_entropy(torch.tensor(grouping(cell.samples)).bincount()) for cell in test]
        scores = [
            torch.tensor([each["own_meaning"] for each in full]),
            torch.tensor([-each["semantic_entropy"] for each in full]),
            torch.tensor(bayes),
            _p_right(SAMPLED, held, full, grouping),
        ]
        found = [estimate(score.double(), right, metrics={"auroc": right_auroc})["auroc"] for score in scores]
        rows.append([str(count), *map(str, found)])
    return markdown_rows(rows)


def ranking(found: Mapping[str, Judged], best: str) -> str:
    """AUROC of being right, and its difference to the best estimator of one adapter, paired over questions; the area
    under the risk-coverage curve."""
    metrics = {"accuracy": RIGHT_METRICS["accuracy"], "auroc": right_auroc, "aurc": RIGHT_METRICS["aurc"]}
    rows = [["estimator", "accuracy", "AUROC", f"less that of {best!r}", "AURC"]]
    for name, each in found.items():
        own = {metric: str(value) for metric, value in estimate(each.score, each.right, metrics=metrics).items()}
        rows.append([name, own["accuracy"], own["auroc"], _less(each, found[best]), own["aurc"]])
    return markdown_rows(rows)


def _less(own: Judged, other: Judged, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(own.right), (RESAMPLES, len(own.right)), generator=generator)
    drawn = torch.tensor([
        right_auroc(own.score[pick], own.right[pick]) - right_auroc(other.score[pick], other.right[pick])
        for pick in picks
    ], dtype=torch.float64)  # fmt: skip
    low, high = drawn.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{right_auroc(*own) - right_auroc(*other):+.3f} [{low:+.3f}, {high:+.3f}]"


def calibration(found: Mapping[str, Judged]) -> str:
    """Confidences in the sense of a probability of being right: before and after."""
    rows = [["confidence", "ECE", "gap", "NLL", "Brier"]]
    likely = {law: found[f"{law}: length-normalised log-probability"] for law in LAWS}
    before = {f"{law}: mean token probability": Judged(each.score.exp(), each.right) for law, each in likely.items()}
    shares = {f"{law}: p(meaning)": found[f"{law}: p(meaning)"] for law in LAWS}
    after = {name: each for name, each in found.items() if "P(right)" in name}
    for name, (score, right) in {**before, **shares, **after}.items():
        values = estimate(score.clamp(1e-3, 1 - 1e-3), right, metrics=RIGHT_METRICS)
        rows.append([name, *(str(values[metric]) for metric in ("ece", "gap", "nll", "brier"))])
    return markdown_rows(rows)


if __name__ == "__main__":
    main()
