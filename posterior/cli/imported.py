"""`posterior import`: PEFT adapters or whole models that somebody trained become the particles of a posterior."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from posterior.cli import arguments
from posterior.data.reading import FORMATS
from posterior.errors import PosteriorError
from posterior.importing import adapters, checkpoints
from posterior.models import full
from posterior.storage.artefact import Posterior

WORST = 3  # matrices that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make a posterior folder of trained LoRA adapters (PEFT), or of whole models: each is a particle."
    )
    parser.add_argument(
        "adapters", nargs="+", type=Path, metavar="FOLDER", help="PEFT adapters of one base and shape; or see --full"
    )
    arguments.add_task(parser)
    parser.add_argument(
        "--weights", nargs="+", type=float, help="a number >= 0 for each particle, normalised (default: equal)"
    )
    group = parser.add_argument_group("whole models")
    group.add_argument(
        "--full",
        action="store_true",
        help="the folders hold whole models in safetensors (full fine-tunes, GaLore, last layers): the difference of "
        "each matrix to the base's is cut to a rank",
    )
    group.add_argument("--rank", type=int, metavar="N", help=f"that rank (default {full.RANK})")
    group.add_argument(
        "--rows",
        type=Path,
        help=f"labelled rows, {FORMATS}: how far are the particles' probabilities of answers from the models'?",
    )


def run(args: argparse.Namespace) -> None:
    posterior = call(args)
    for line in cut_lines(posterior):
        print(line)
    print(
        f"wrote {posterior.path} ({posterior.name}@{posterior.hash[:12]}, {len(posterior.weights)} particles); "
        f"try `posterior evaluate {args.out} DATA` or `posterior serve`"
    )


def cut_lines(posterior: Posterior) -> Iterator[str]:
    """What cutting whole models to a rank lost, a line for each; none of adapters."""
    errors = posterior.fit.get("errors", {})
    for number, fact in enumerate(posterior.fit.get("checkpoints", {}).values()):
        worst = sorted(errors, key=lambda module: -errors[module][number])[:WORST]
        named = ", ".join(f"{module} {errors[module][number]:.3g}" for module in worst)
        yield (
            f"{fact['folder']}: {fact['matrices']} matrices changed; rank {posterior.lora['r']} leaves out "
            f"{fact['error']:.3g} of the change (relative Frobenius norm), most in {named}"
        )
        if "total_variation" in fact:
            distance, rows = fact["total_variation"], posterior.fit["compared"]["rows"]
            yield (
                f"{fact['folder']}: total variation between the model's answers and the particle's over {rows} rows: "
                f"mean {distance['mean']:.3g}, largest {distance['largest']:.3g}"
            )


@arguments.in_options
def call(args: argparse.Namespace) -> Posterior:
    """The import that the options ask for."""
    task, shared = arguments.task(args), {"out": args.out, "base": args.base, "weights": args.weights}
    if args.full:
        rank = full.RANK if args.rank is None else args.rank
        return checkpoints.collect(args.adapters, task=task, rank=rank, rows=args.rows, **shared)
    if args.rank is not None or args.rows is not None:
        raise PosteriorError(
            f"{'--rows' if args.rank is None else '--rank'} belongs to --full; adapters are taken whole"
        )
    return adapters.collect(args.adapters, task=task, **shared)
