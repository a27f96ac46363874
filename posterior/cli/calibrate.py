"""`posterior calibrate`: a calibration record beside the posterior; the server applies it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from posterior.calibration.choice import Choice
from posterior.calibration.conformal import MIN_ROWS
from posterior.calibration.records import Record
from posterior.cli import arguments, options
from posterior.data.reading import FORMATS
from posterior.errors import PosteriorError
from posterior.evaluation.calibrate import Calibrated, Calibration, calibrate
from posterior.evaluation.report import markdown, markdown_rows
from posterior.storage import artefact

SETTINGS: Mapping[str, type] = {"calibrate": Calibration}


def add_arguments(parser: argparse.ArgumentParser, settings: Mapping[str, type] = SETTINGS) -> None:
    """Add the options of `posterior calibrate`, with those of these settings."""
    parser.description = (
        "Calibrate a posterior on held-out rows: compare its predictives and calibrators, and write a record of the "
        "cheapest that is as good as the best. The server answers with it, and applies the record."
    )
    parser.add_argument("posterior", help="a posterior folder")
    rows = f"at least {MIN_ROWS} held-out rows like the training data: {FORMATS}"
    parser.add_argument("data", nargs="?", help=rows)
    options.add(parser, settings)
    arguments.add_base(parser)
    arguments.add_json(parser)


def run(args: argparse.Namespace, settings: Calibration | None = None) -> None:
    """Calibrate with these settings (None: those that the options ask for), and print what was found."""
    found = call(args, settings)
    if found.choice is not None:
        print(found.choice.model_dump_json() if args.json else comparison(found.choice) + "\n")
    for record, path in found.records:
        show(record, path, as_json=args.json)
    for path in [] if args.json else found.familiarity:
        print(f"wrote {path}, which tells how familiar a question is")


def comparison(choice: Choice) -> str:
    """What was compared, the least NLL first, and which was chosen."""
    rows = [
        [each.predictive, each.method, str(each.nll), "yes" if each.close else "no", str(each.evaluations)]
        for each in sorted(choice.compared, key=lambda each: each.nll.value)
    ]
    heading = ["predictive", "calibrator", "NLL (cross-fitted)", "within one standard error", "evaluations an answer"]
    table = markdown_rows([heading, *rows])
    return f"{table}\n\nserved by default: {choice.predictive}, the cheapest within one standard error of the least NLL"


def show(record: Record, path: Path, *, as_json: bool) -> None:
    """Print a table, or a line of JSON."""
    if as_json:
        print(json.dumps(record.model_dump(mode="json")))
        return
    if record.key.question is not None:
        print(f"questions: {record.key.question}\n")
    name, method = record.key.predictive, record.calibrator.method
    print(markdown({name: record.before, f"{name}, {method} (cross-fitted)": record.after}, record.n))
    print(
        f"\nprediction sets ({record.conformal.score}) at coverage {record.coverage:g}, cross-fitted: "
        f"covered {record.sets['covered']}, mean size {record.sets['size']}\nwrote {path}"
    )


@arguments.in_options
def call(args: argparse.Namespace, settings: Calibration | None = None) -> Calibrated:
    """The calibration that the options ask for, or with these settings."""
    settings = settings or options.build("calibrate", SETTINGS, options.given(args, SETTINGS))
    if args.data is None:
        raise PosteriorError("the held-out rows are missing; name a file of them after the posterior")
    return calibrate(artefact.load(args.posterior), args.data, base=args.base, settings=settings)
