"""How long should an adapter train, and does the evidence know? Laplace fits of several numbers of epochs.

    python -m benchmarks.epochs --data FOLDER --sets arc_easy --epochs 2 4 8 16

For each: the log-likelihood of the training rows, their log evidence, and what the linearised predictive and the mean
alone are worth on other rows of the training file, which are in no other benchmark: accuracy, NLL and signed gap, with
95 % bootstrap intervals. `--work` keeps the fits, so a second run only evaluates.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import CALIBRATION, Data, read
from posterior.calibration.metrics import Estimate, estimate
from posterior.cli import fit
from posterior.data.examples import encode
from posterior.data.reading import Row
from posterior.evaluation.predictions import linearized, map_scores
from posterior.models import lora
from posterior.models.base import Base, load_model, load_tokenizer, resolve
from posterior.storage import artefact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with arc_easy/, openbookqa/, sst2/, ...")
    parser.add_argument("--sets", nargs="+", default=["arc_easy"])
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=128, help="training rows (default %(default)s)")
    parser.add_argument("--other-rows", type=int, default=400, help="other rows (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--work", type=Path, help="folder that keeps the fitted posteriors between runs")
    args = parser.parse_args()
    base = resolve()
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.sets:
            first = args.rows + CALIBRATION  # of the rows that the grid neither fits nor calibrates on
            other = read(name, args.data, first + args.other_rows, 0).train[first:]
            print(
                f"\n### {name}: {args.rows} rows, seed {args.seed}, learning rate {args.learning_rate:g}; "
                f"{len(other)} other rows\n\n| epochs | log-likelihood | log evidence | mean alone: accuracy | NLL "
                "| gap | linearised: accuracy | NLL | gap |\n" + "|---" * 9 + "|",
                flush=True,
            )
            for epochs in args.epochs:
                posterior = fitted(read(name, args.data, args.rows, 0), epochs, args, args.work or Path(scratch))
                cells = [f"{posterior.fit[key]:.1f}" for key in ("log_likelihood", "evidence")]
                for found in worth(base, posterior, other, args.dtype):
                    cells += [str(found[metric]) for metric in ("accuracy", "nll", "gap")]
                print("| " + " | ".join([str(epochs), *cells]) + " |", flush=True)


def fitted(data: Data, epochs: int, args: argparse.Namespace, work: Path) -> artefact.Posterior:
    """The posterior of these rows, from `work` if it is there."""
    work.mkdir(parents=True, exist_ok=True)
    folder = work / f"{data.name}-{len(data.train)}-{args.seed}-{args.learning_rate:g}-{epochs}"
    if (folder / "posterior.json").is_file():
        return artefact.load(folder)
    rows = work / f"{folder.name}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in data.train), encoding="utf-8")
    words = [str(rows), "--out", str(folder), "--template", data.template, "--dtype", args.dtype]
    words += ["--answers", *data.answers] if data.answers else []
    words += ["--epochs", str(epochs), "--learning-rate", str(args.learning_rate), "--seed", str(args.seed)]
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    return fit.call(parser.parse_args(words))


def worth(base: Base, posterior: artefact.Posterior, rows: list[Row], dtype: str) -> list[dict[str, Estimate]]:
    """The metrics of the mean alone and of the linearised predictive."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = lora.load_peft(load_model(base, getattr(torch, dtype), device), posterior.map_dir)
    model.eval().requires_grad_(False)
    examples = encode(posterior.task, load_tokenizer(base), rows)
    y = torch.tensor([example.label for example in examples])
    predictive = linearized(model, posterior.covariance, examples).probability
    return [estimate(map_scores(model, examples).softmax(1), y), estimate(predictive, y)]


if __name__ == "__main__":
    main()
