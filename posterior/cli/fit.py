"""`posterior fit`: data (and optionally somebody's PEFT adapter) in, a posterior folder out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from posterior.cli import arguments, options
from posterior.data.reading import FORMATS
from posterior.fitting import LONGEST, fit
from posterior.laplace.gaussian import Laplace
from posterior.models import devices
from posterior.particles.blob import Blob
from posterior.particles.dropout import Dropout
from posterior.particles.ensemble import Ensemble
from posterior.particles.ivon import Ivon
from posterior.particles.svgd import Svgd
from posterior.particles.swag import Swag
from posterior.particles.tfb import Tfb
from posterior.storage.artefact import Posterior
from posterior.training.method import Method

METHODS: dict[str, type[Method]] = {
    "laplace": Laplace,
    "ensemble": Ensemble,
    "svgd": Svgd,
    "dropout": Dropout,
    "swag": Swag,
    "blob": Blob,
    "ivon": Ivon,
    "tfb": Tfb,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Fit a posterior over LoRA adapters to labelled rows."
    parser.add_argument(
        "data",
        help=f'training rows, {FORMATS}: {{"text": ..., "label": 1}} for a choice; {{"input": ..., '
        '"question": {...}, "answer": ...} for a decision; {"messages": [...]} for text',
    )
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        default="laplace",
        help="; ".join(f"{name}: {_summary(method)}" for name, method in METHODS.items()) + " (default laplace)",
    )
    arguments.add_task(parser)
    options.add(parser, METHODS)
    group = parser.add_argument_group("rows and machine")
    group.add_argument("--heldout", type=Path, help="laplace: rows for --prior-precision heldout, like the data")
    group.add_argument(
        "--max-length",
        type=int,
        help=f"longest row in tokens; longer ones are an error (default {LONGEST}, or the base's context if shorter)",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the base's weights (default: bfloat16 on CUDA, else float32)",
    )
    group.add_argument("--device", help=devices.HELP)


def _summary(method: type[Method]) -> str:
    """The first line of its docstring."""
    line = (method.__doc__ or "").strip().splitlines()[0].rstrip(".")
    return line[0].lower() + line[1:]


def method(args: argparse.Namespace) -> Any:
    """The settings that the options say. Raises PosteriorError."""
    return options.build(args.method, METHODS, options.given(args, METHODS))


def run(args: argparse.Namespace) -> None:
    posterior = call(args)
    print(
        f"wrote {posterior.path} ({posterior.name}@{posterior.hash[:12]}); "
        f"try `posterior evaluate {args.out} DATA` or `posterior serve`"
    )


@arguments.in_options
def call(args: argparse.Namespace) -> Posterior:
    """The fit that the options ask for."""
    return fit(
        args.data,
        task=arguments.task(args, "{text}"),
        method=method(args),
        out=args.out,
        base=args.base,
        heldout=args.heldout or (),
        max_length=args.max_length,
        dtype=args.dtype,
        device=args.device,
    )
