"""`posterior doctor`, with the options of `posterior serve`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from posterior.errors import PosteriorError
from server.configuration import reading
from server.configuration.schema import ServeSettings
from server.doctor import machine, memory, served, stack
from server.doctor.line import Line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of `posterior serve`, and --json."""
    reading.add_arguments(parser)
    parser.epilog = "Status 0: the server can start; lines that begin with warn are advice. Status 1: a line says fail."
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> None:
    """Print what was found. Exits with 1 if the server cannot start so."""
    found = lines(args)
    if args.json:
        print(json.dumps([dataclasses.asdict(line) for line in found]))
    else:
        print("\n".join(shown(line) for line in found))
    if any(line.status == "fail" for line in found):
        sys.stdout.flush()
        sys.exit(1)


def lines(args: argparse.Namespace) -> list[Line]:
    """Every check, in the order in which a start would meet it."""
    file = reading.config(args)
    try:
        settings = reading.read(args)
        first = [Line("settings", "ok", f"of {file}, the environment and options" if file else "as asked for")]
    except PosteriorError as error:
        settings = ServeSettings()
        first = [Line("settings", "fail", str(error), "change it; the other checks are of the defaults")]
    return [
        *first,
        *machine.secrets(file),
        *stack.python(),
        *stack.packages(),
        *stack.options(settings),
        *machine.compiler(settings),
        *machine.access(settings),
        *machine.place(settings),
        *machine.folders(settings),
        *served.posteriors(settings.posteriors),
        *memory.lines(settings),
    ]


def shown(line: Line) -> str:
    """The line for people."""
    return f"{line.status:<4}  {line.check:<10}  {line.what}{f'; {line.do}' if line.do else ''}"
