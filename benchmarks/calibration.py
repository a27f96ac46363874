"""Is the uncertainty true? MAP, temperature scaling and Laplace on small fine-tuning sets, with bootstrap intervals.

    python -m benchmarks.calibration                      yelp, whose sentences ship in benchmarks/data
    python -m benchmarks.calibration --sst2 FOLDER        SST-2 too: {train,dev,test}.jsonl with "prompt" and "label"

Every method starts from the same MAP of the same rows. The temperature is fitted on the calibration split; the best
possible
temperature, chosen on the test rows themselves, is what no honest method can know. `--work` keeps the fits, so a
second run
only evaluates. The prior study asks what centring the prior at the initialisation, and separating A from B, does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posterior import artefact, fit, laplace, lora
from posterior.base import Base, load_model, load_tokenizer, resolve
from posterior.data import Example, Row, encode, read_jsonl
from posterior.evaluate import linearized, map_scores, markdown, sampled
from posterior.metrics import Estimate, best_temperature, estimate, nll

DATA = Path(__file__).parent / "data"
TEMPLATE, ANSWERS = "{text}\\nSentiment:", [" negative", " positive"]
PARTICLES = 8


@dataclass(frozen=True)
class Set:
    """One data set: rows to fit, to calibrate on and to test on, with fields text and label."""

    name: str
    train: list[Row]
    calibration: list[Row]
    test: list[Row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sst2", type=Path, help="folder with SST-2's train.jsonl, dev.jsonl and test.jsonl")
    parser.add_argument("--rows", type=int, default=128, help="training rows (default %(default)s)")
    parser.add_argument("--test-rows", type=int, help="test rows (default: all)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, help="folder that keeps the fitted posteriors between runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        for data in sets(args):
            for seed in args.seeds:
                report(data, seed, args, work)


def sets(args: argparse.Namespace) -> Iterator[Set]:
    """yelp, and SST-2 when its folder is given; exact duplicates of training rows are dropped from the test rows."""
    yelp = [read_jsonl(DATA / f"yelp.{part}.jsonl") for part in ("train", "calibration", "test")]
    folders = [("yelp", yelp)]
    if args.sst2:
        parts = [read_jsonl(args.sst2 / f"{part}.jsonl") for part in ("train", "dev", "test")]
        folders.append(("sst2", [[row | {"text": row["prompt"]} for row in part] for part in parts]))
    for name, (train, calibration, test) in folders:
        train = train[: args.rows]
        known = {row["text"] for row in train}
        fresh = [row for row in test if row["text"] not in known][: args.test_rows]
        yield Set(name, train, [row for row in calibration if row["text"] not in known][:200], fresh)


def report(data: Set, seed: int, args: argparse.Namespace, work: Path) -> None:
    """Fit (unless kept), evaluate and print one set at one seed."""
    options = fit_options(data, seed, args, work)
    folder = Path(options.out)
    posterior = artefact.load(folder) if (folder / "posterior.json").is_file() else fit.fit(options)
    base = resolve()
    tokenizer: Any = load_tokenizer(base)
    test, calibration = (encode(posterior.task, tokenizer, rows) for rows in (data.test, data.calibration))
    model = (
        lora.load_peft(load_model(base, torch.float32, options.device), posterior.map_dir).eval().requires_grad_(False)
    )
    labels = torch.tensor([example.label for example in test])
    f = map_scores(model, test)
    temperature = best_temperature(map_scores(model, calibration), torch.tensor([row.label for row in calibration]))
    best = best_temperature(f, labels)
    lines = linearized(model, posterior.curvature, posterior.precision, test)
    table = {
        "MAP": estimate(f.softmax(1), labels),
        f"MAP, temperature {temperature:.2f} from the calibration split": estimate(
            (f / temperature).softmax(1), labels
        ),
        f"MAP, best temperature {best:.2f} chosen on test (not honest)": estimate((f / best).softmax(1), labels),
        f"Laplace, {PARTICLES} samples": estimate(sampled(model, posterior, PARTICLES, test), labels),
        "Laplace, linearised (default)": estimate(lines, labels),
    }
    heldout = fit.heldout_precision(model, posterior.curvature, posterior.precision, calibration, 16)
    held = linearized(model, posterior.curvature, heldout, test)
    table["Laplace, linearised, prior by held-out NLL"] = estimate(held, labels)
    print(f"\n## {data.name}: {len(data.train)} rows, {args.epochs} epochs, seed {seed}\n")
    print(markdown(table, len(test)))
    print(
        "\nPrior precision: " + ", ".join(f"{key} {value:.1f}" for key, value in posterior.prior["precision"].items())
    )
    verdict(table["Laplace, linearised (default)"], table["MAP"], nll((f / best).softmax(1), labels))
    prior_study(model, posterior, base, test, labels, options)


def verdict(ours: dict[str, Estimate], plain: dict[str, Estimate], best_nll: float) -> None:
    """The issue's three wishes for the default, with what was measured."""
    ratio = ours["nll"].value / best_nll
    wishes = {
        f"NLL / best temperature's NLL = {ratio:.3f} (wanted <= 1.05)": ratio <= 1.05,
        f"|signed gap| = {abs(ours['gap'].value):.3f} (wanted <= 0.03)": abs(ours["gap"].value) <= 0.03,
        f"accuracy - MAP's = {ours['accuracy'].value - plain['accuracy'].value:+.3f} (wanted >= 0)": ours[
            "accuracy"
        ].value
        >= plain["accuracy"].value,
    }
    print("\n" + "\n".join(f"- {'met' if met else 'MISSED'}: {wish}" for wish, met in wishes.items()))


def prior_study(
    model: Any,
    posterior: artefact.Posterior,
    base: Base,
    test: list[Example],
    labels: torch.Tensor,
    options: argparse.Namespace,
) -> None:
    """The evidence's choice and its predictive for other prior means and groupings, post hoc, at the same MAP and
    curvature."""
    fresh = lora.attach(load_model(base, torch.float32, options.device), rank=options.rank, seed=options.seed)
    start, theta = lora.get(fresh), lora.get(model)
    zero = {name: torch.zeros_like(value) for name, value in theta.items()}
    cases: dict[str, tuple[lora.Theta, laplace.Grouping]] = {
        "zero, one lambda": (zero, "scalar"),
        "initialisation, one lambda": (start, "scalar"),
        "initialisation, A and B apart": (start, "side"),
        "initialisation, one lambda a layer": (start, "layer"),
    }
    table = {}
    for name, (origin, grouping) in cases.items():
        distance = {key: laplace.square_distance(theta, origin, [key]) for key in theta}
        precision = laplace.optimal_precision(posterior.curvature, distance, grouping)
        groups = fit.summary(precision, grouping)
        shown = "/".join(f"{value:.1f}" for value in groups.values()) if len(groups) < 3 else f"{len(groups)} values"
        p = linearized(model, posterior.curvature, precision, test)
        table[f"{name}: {shown}"] = estimate(p, labels)
    print("\nPrior mean and grouping (prior precision by the evidence), linearised:\n")
    print(markdown(table, len(test)))


def fit_options(data: Set, seed: int, args: argparse.Namespace, work: Path) -> argparse.Namespace:
    """`posterior fit`'s own defaults, with this set's rows."""
    work.mkdir(parents=True, exist_ok=True)
    name = f"{data.name}-{len(data.train)}-{args.epochs}-{seed}"
    rows = work / f"{name}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in data.train), encoding="utf-8")
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    words = [str(rows), "--out", str(work / name), "--template", TEMPLATE, "--answers", *ANSWERS]
    return parser.parse_args([*words, "--epochs", str(args.epochs), "--seed", str(seed)])


if __name__ == "__main__":
    main()
