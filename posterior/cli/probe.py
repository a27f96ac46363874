"""`posterior probe`: what a posterior says of a few rows, kept in its folder for servers to compare."""

from __future__ import annotations

import argparse

from posterior.calibration.probes import MAX_TOKENS, ROWS
from posterior.cli import arguments
from posterior.data.reading import FORMATS
from posterior.evaluation.probing import probe
from posterior.models import devices
from posterior.storage import artefact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compute what a posterior says of a few rows, with transformers and peft, and keep the rows and the "
        "probabilities in its folder. A server compares what it serves with them when it loads the posterior. "
        "`posterior fit` does so with training rows; held-out rows also tell whether the posterior is too sure."
    )
    parser.add_argument("posterior", help="a posterior folder")
    text = f"rows like the training data, of which the first {ROWS} of at most {MAX_TOKENS} tokens are taken: {FORMATS}"
    parser.add_argument("data", help=text)
    arguments.add_base(parser)
    parser.add_argument("--device", help=devices.HELP)


def run(args: argparse.Namespace) -> None:
    """Write the probes. Raises PosteriorError."""
    path = probe(artefact.load(args.posterior), args.data, base=args.base, device=args.device)
    print(f"wrote {path}, with which a server compares what it serves")
