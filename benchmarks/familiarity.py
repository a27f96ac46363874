"""Which number tells that a question is unlike those of the fit?

    python -m benchmarks.familiarity --data FOLDER --banking POSTERIOR [--arc POSTERIOR]

Familiar questions are test rows of the set that a posterior was fitted to, strange ones are of another set: banking77
against clinc150's out-of-scope questions (asked for the department), yelp (the shipped posterior) and ARC-Easy against
MMLU's computer science and chemistry. Each measure's AUROC is the probability that a strange question gets more of it
than a familiar one. `1 - familiarity` is what the server says, from held-out rows, which are neither training nor test
rows; sums are of ranks among these. Intervals are of the difference to the best score of the MAP (its entropy, or one
minus its largest probability), over 1,000 resamples of both sides.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.cells import read
from benchmarks.support import DEPARTMENT
from posterior.calibration.familiarity import Center, Familiarity
from posterior.calibration.metrics import ood_auroc
from posterior.curvature.sketch import Full
from posterior.data.examples import Examples, batches, encode
from posterior.data.reading import Row, read_rows
from posterior.evaluation.familiar import asked
from posterior.evaluation.predictions import each_sampled, map_scores
from posterior.evaluation.report import markdown_rows
from posterior.laplace.blockwise import Blocks, Covariance
from posterior.laplace.linearized import jacobians
from posterior.likelihood.directions import directions, movements
from posterior.likelihood.states import last_states
from posterior.models import lora
from posterior.models.base import Base, load_model, load_tokenizer, resolve
from posterior.predictive.mixture import entropy, from_gaussian
from posterior.storage import artefact

BATCH, PARTICLES, RESAMPLES = 8, 8, 1000
SHIPPED = Path(__file__).parents[1] / "posterior" / "shipped" / "sentiment"
DATA = Path(__file__).parent / "data"
MAP_SCORES = ("MAP entropy", "1 - MAP's largest p")
SUMS = (
    ("total entropy", "score variance"), ("total entropy", "Mahalanobis"), ("score variance", "Mahalanobis"),
    ("mutual information", "Mahalanobis"), ("total entropy", "score variance", "Mahalanobis"),
)  # fmt: skip
Measures = dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """Rows that a posterior was fitted to; those that `posterior calibrate` gets; those among them that were asked the
    same as the familiar test rows; and these and strange test rows."""

    name: str
    posterior: artefact.Posterior
    train: list[Row]
    calibration: list[Row]
    held: list[Row]
    familiar: list[Row]
    strange: list[Row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--banking", type=Path, help="posterior of benchmarks/data/support.train.jsonl")
    parser.add_argument("--arc", type=Path, help="posterior of the first 128 rows of ARC-Easy")
    parser.add_argument("--rows", type=int, default=200, help="of each side, at most (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="only what takes no gradients and no particles")
    args = parser.parse_args()
    for pair in pairs(args):
        print(report(pair, resolve(), quick=args.quick) + "\n", flush=True)


def pairs(args: argparse.Namespace) -> list[Pair]:
    found = []
    if args.banking:
        parts = {name: read_rows(DATA / f"support.{name}.jsonl") for name in ("train", "calibration", "test")}
        asked = {name: [row for row in part if row["question"] == DEPARTMENT] for name, part in parts.items()}
        oos = read_rows(args.data / "clinc150" / "oos.jsonl")
        strange = [{"input": row["text"], "question": DEPARTMENT, "answer": "cards"} for row in oos]
        found.append(
            Pair("banking77 / clinc150 oos", artefact.load(args.banking), asked["train"], parts["calibration"],
                 asked["calibration"], asked["test"], strange)
        )  # fmt: skip
    for name, folder in {"yelp": SHIPPED, "arc_easy": args.arc}.items():
        if folder is not None:
            data = read(name, args.data, 400 if name == "yelp" else 128, args.rows)
            others = [row for part, rows in data.others.items() if part.startswith("ood") for row in rows]
            label = f"{name} / MMLU computer science and chemistry"
            held = data.calibration
            found.append(Pair(label, artefact.load(folder), data.train, held, held, data.test, others))
    return [
        replace(
            each, held=each.held[: args.rows], familiar=each.familiar[: args.rows], strange=each.strange[: args.rows]
        )
        for each in found
    ]


def report(pair: Pair, base: Base, *, quick: bool) -> str:
    """A table of all measures and of sums of two or three ranks."""
    task, posterior, tokenizer = pair.posterior.task, pair.posterior, load_tokenizer(base)
    model = lora.load_peft(load_model(base, torch.float32, "cpu"), posterior.map_dir).eval().requires_grad_(False)
    train = last_states(model, encode(task, tokenizer, pair.train)).double()
    questions = [asked(task, row) for row in pair.calibration]
    known = Familiarity.fit(last_states(model, encode(task, tokenizer, pair.calibration)), questions)
    held, inside, outside = (
        measures(model, posterior, encode(task, tokenizer, rows), train, known, quick=quick)
        for rows in (pair.held, pair.familiar, pair.strange)
    )
    for names in () if quick else SUMS:
        for part in (inside, outside):
            part[" + ".join(names)] = sum((ranks(held[name], part[name]) for name in names), torch.zeros(()))
    best = max(MAP_SCORES, key=lambda name: ood_auroc(inside[name], outside[name]))
    lines = [["measure", "AUROC", f"less that of {best}"]]
    for name in inside:
        difference = resampled(lambda a, b, name=name: area(a, b, name) - area(a, b, best), inside, outside)
        lines.append([name, f"{area(inside, outside, name):.3f}", difference])
    low = [float((part["1 - familiarity"] >= 0.95 - 1e-9).double().mean()) for part in (inside, outside)]
    return (
        f"{pair.name}: {len(pair.familiar)} familiar rows, {len(pair.strange)} strange; {low[0]:.3f} and {low[1]:.3f} "
        f"of them have a familiarity of at most .05\n\n{markdown_rows(lines)}"
    )


def measures(
    model: Any, posterior: artefact.Posterior, examples: Examples, train: Tensor, known: Familiarity, *, quick: bool
) -> Measures:
    """Each [N]: the more, the stranger. train [M, D]: states of the training rows."""
    states = last_states(model, examples).double()
    one = Center.fit(train, torch.zeros(len(train), dtype=torch.long))
    p = map_scores(model, examples).softmax(1)
    result = {"MAP entropy": entropy(p), "1 - MAP's largest p": 1 - p.max(1).values}
    if not quick:
        result |= of_the_posterior(model, posterior, examples)
    result["Mahalanobis"] = known.center.nearest(states)[0]
    result["1 - familiarity"] = 1 - torch.tensor(known(states), dtype=torch.float64)
    result["Mahalanobis, training rows"] = one.nearest(states)[0]
    result["nearest training rows"] = neighbours(train, states)
    return result


def of_the_posterior(model: Any, posterior: artefact.Posterior, examples: Examples) -> Measures:
    """Those that ask the Laplace covariance or particles."""
    found: dict[str, list[float]] = {}
    order: list[int] = []
    matrices, covariance = lora.matrices(model), posterior.covariance
    prior = without_data(covariance)
    matrices = {name: matrices[name] for name in covariance.precision}
    for indices, batch in tqdm(list(batches(examples, BATCH)), desc="measuring", leave=False):
        order += indices
        f, iterator = jacobians(model, matrices, batch, directions)
        parts = list(iterator)
        moved = movements(f)
        spreads = [(moved @ each.of_scores(parts)[0] @ moved.mT) for each in (covariance, prior)]
        for row in range(len(f)):
            for name, value in _measured(f[row], spreads[0][row], spreads[1][row]).items():
                found.setdefault(name, []).append(value)
    result = {name: torch.tensor(values, dtype=torch.float64)[torch.tensor(order).argsort()]
              for name, values in found.items()}  # fmt: skip
    particles = [each for each in each_sampled(model, posterior, PARTICLES, examples)]
    result["mutual information of 8 particles"] = torch.tensor([each.epistemic for each in particles]).double()
    result["intersection entropy of 8 particles"] = torch.tensor(
        [_credal(each.interval) for each in particles]
    ).double()
    return result


def without_data(covariance: Covariance) -> Covariance:
    """The prior's."""
    if isinstance(covariance, Full):
        return replace(covariance, basis=covariance.basis[:, :0], values=covariance.values[:0])
    assert isinstance(covariance, Blocks)
    return replace(covariance, curvature={name: each.scaled(0.0) for name, each in covariance.curvature.items()})


def _measured(f: Tensor, spread: Tensor, prior: Tensor) -> dict[str, float]:
    """Of one row's scores f [C], their covariance [C, C] after and before the data."""
    predictive = from_gaussian(f, spread)
    width = len(f)
    centred = torch.eye(width, dtype=f.dtype) - 1 / width
    after, before = (float((centred @ each @ centred).trace()) for each in (spread, prior))
    return {
        "total entropy": predictive.total,
        "variation ratio": 1 - float(predictive.probability.max()),
        "mutual information": predictive.epistemic,
        "score variance": after / (width - 1),
        "score variance by the prior's": after / before,
        "score variance of the prior": before / (width - 1),
        "variance of p": float(predictive.variance.sum()),
        "share that is epistemic": predictive.epistemic / max(predictive.total, 1e-12),
    }


def _credal(interval: Tensor) -> float:
    """The largest entropy that probabilities [C] within the interval [C, 2] of each can have: their logits' bisection
    on a common level (water filling)."""
    low, high = interval[:, 0], interval[:, 1].clamp(min=1e-12)
    bottom, top = 0.0, 1.0
    for _ in range(60):
        level = (bottom + top) / 2
        bottom, top = (level, top) if float(low.maximum(high.clamp(max=level)).sum()) < 1 else (bottom, level)
    p = low.maximum(high.clamp(max=top))
    return float(entropy(p / p.sum()))


def neighbours(train: Tensor, states: Tensor, count: int = 5) -> Tensor:
    """Mean cosine distance [N] of states [N, D] to the nearest training rows' [M, D], from their mean."""
    ours, theirs = (torch.nn.functional.normalize(each - train.mean(0), dim=1) for each in (states, train))
    return 1 - (ours @ theirs.T).topk(count, 1).values.mean(1)


def ranks(held: Tensor, values: Tensor) -> Tensor:
    """The share [N] of held-out familiar rows that have less."""
    return torch.searchsorted(held.sort().values, values).double() / len(held)


def area(inside: Mapping[str, Tensor], outside: Mapping[str, Tensor], name: str) -> float:
    return ood_auroc(inside[name], outside[name])


def resampled(value: Callable[[Measures, Measures], float], inside: Measures, outside: Measures) -> str:
    """The value and its central 95 % bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(RESAMPLES):
        sides = []
        for part in (inside, outside):
            count = len(next(iter(part.values())))
            picks = torch.randint(count, (count,), generator=generator)
            sides.append({name: each[picks] for name, each in part.items()})
        found.append(value(*sides))
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    if math.isnan(low):
        return "-"
    return f"{value(inside, outside):+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    main()
