"""`posterior evaluate`: the MAP beside the posterior on test rows."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from posterior.cli import arguments, options
from posterior.data.reading import FORMATS
from posterior.errors import PosteriorError
from posterior.evaluation.evaluate import Evaluation, evaluate
from posterior.evaluation.report import START, Report, markdown_rows
from posterior.storage import artefact

SETTINGS = {"evaluate": Evaluation}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Compare the MAP adapter with the posterior predictive on labelled rows of a choice task."
    parser.add_argument("posterior", help="a posterior folder")
    parser.add_argument("data", type=Path, help=f"test rows like the training data: {FORMATS}")
    parser.add_argument(
        "--calibration",
        type=Path,
        help="held-out rows for prediction sets, and for a temperature of the MAP, shown as a baseline",
    )
    parser.add_argument(
        "--ood", type=Path, help="rows of another kind (labels are not read): does entropy tell them from DATA's?"
    )
    parser.add_argument("--report", type=Path, metavar="HTML", help="also write one page with tables and plots")
    options.add(parser, SETTINGS)
    arguments.add_base(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.report:
        _check_report(args.report)
    report = call(args)
    if args.report:
        report.save(args.report)
    if args.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        print("\n\n".join(map(markdown_rows, report.tables())))


@arguments.in_options
def call(args: argparse.Namespace) -> Report:
    """The evaluation that the options ask for."""
    settings = options.build("evaluate", SETTINGS, options.given(args, SETTINGS))
    posterior = artefact.load(args.posterior)
    return evaluate(posterior, args.data, calibration=args.calibration, ood=args.ood, base=args.base, settings=settings)


def _check_report(path: Path) -> None:
    """Raises PosteriorError unless a page may be written there: nothing is there, or an empty file, or such a page."""
    if path.is_dir():
        raise PosteriorError(f"--report {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise PosteriorError(f"--report {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PosteriorError(f"--report {path}: you may not write into {path.parent}; name another folder")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise PosteriorError(f"--report {path} is no regular file; nothing was touched: name another")
    if path.exists():
        with path.open("rb") as file:
            start = file.read(len(START))
        if start not in (b"", START):
            raise PosteriorError(
                f"--report {path} holds something else than a report; nothing was touched: name another"
            )
