"""`posterior import`: PEFT adapters that somebody trained become the particles of a posterior."""

from __future__ import annotations

import argparse
from pathlib import Path

from posterior.cli import arguments
from posterior.importing import collect
from posterior.storage.artefact import Posterior


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Make a posterior folder of trained PEFT LoRA adapters: each is a particle."
    parser.add_argument("adapters", nargs="+", type=Path, metavar="FOLDER", help="PEFT adapters of one base and shape")
    arguments.add_task(parser)
    parser.add_argument(
        "--weights", nargs="+", type=float, help="a number >= 0 for each adapter, normalised (default: equal)"
    )


def run(args: argparse.Namespace) -> None:
    posterior = call(args)
    print(
        f"wrote {posterior.path} ({posterior.name}@{posterior.hash[:12]}, {len(posterior.weights)} particles); "
        f"try `posterior evaluate {args.out} DATA` or `posterior serve`"
    )


def call(args: argparse.Namespace) -> Posterior:
    """The import that the options ask for."""
    return collect(args.adapters, task=arguments.task(args), out=args.out, base=args.base, weights=args.weights)
