"""The command `posterior`. Each verb imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, NoReturn

from posterior.cli.options import EMPTY
from posterior.data import tokens
from posterior.errors import PosteriorError, first_line, shortened
from server import logs

VERBS = {
    "fit": ("posterior.cli.fit", "fit a posterior on LoRA weights to your data"),
    "import": ("posterior.cli.imported", "make a posterior of adapters or whole models that were trained elsewhere"),
    "evaluate": ("posterior.cli.evaluate", "accuracy and calibration of the MAP beside the posterior"),
    "calibrate": ("server.calibrate.verb", "fit calibrated probabilities and prediction sets on held-out rows"),
    "probe": ("posterior.cli.probe", "keep what a posterior says of a few rows, for servers to compare"),
    "inspect": ("posterior.cli.inspect", "what a posterior folder holds, verified"),
    "serve": ("server.main", "answer OpenAI's API with posterior predictive distributions"),
    "doctor": ("server.doctor.verb", "check whether this machine can serve, and say what to do"),
    "key": ("server.access.new", "make a key for `posterior serve --keys`"),
    "ask": ("posterior_client.ask", "ask a running server from the terminal"),
}
TRACEBACK = "POSTERIOR_TRACEBACK"  # in the environment: print the traceback of what we did not foresee
WAYS_OUT = {  # what to do about an error of the operating system
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.EACCES: "change its permissions or name another place",
    errno.EPERM: "change its permissions or name another place",
    errno.EROFS: "name a place that can be written",
    errno.EMFILE: "allow more open files: `ulimit -n 4096`",
    errno.ENOMEM: "free memory, or ask for less: a smaller --batch-size or --max-length",
}


class Parser(argparse.ArgumentParser):
    """A usage error is one line. A text or a path is not empty, unless its option says `type=str`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", None, _given)
        self.register("type", Path, lambda text: Path(_given(text)))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"posterior: {shortened(' '.join(message.split()))}; see `{self.prog} --help`\n")

    def print_help(self, file: Any = None) -> None:
        """argparse's own says nothing of help that cannot be written."""
        print(self.format_help(), end="", file=file, flush=True)


def _given(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError(EMPTY)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 after one line on stderr for what the user can change; 1 after one line for a fault of ours;
    130 and 143 after Ctrl-C and SIGTERM; 141 when nobody reads on."""
    # Read when torch is first imported. Threads that spin while they wait made a busy 2-core machine 30 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    _open_streams()
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("posterior: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has enough of it, as in `posterior ask --json ... | head`
        return 141
    except Exception as error:
        status, line = explain(error)
        print(logs.line(shortened(" ".join(line.split())), logging.ERROR), file=sys.stderr)
        return status
    finally:
        signal.signal(signal.SIGTERM, before)
        _close_stdout()
    return 0


def _run(given: list[str]) -> None:
    for number, word in enumerate(given, 1):
        tokens.check(word, f"argument {number}, {word!r},")
    parser = Parser(prog="posterior", description="Posterior distributions on LoRA weights: fit them, serve them.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    for verb, (_, text) in VERBS.items():
        verbs.add_parser(verb, help=text, description=text, add_help=False)
    if not given or given[0] not in VERBS:
        parser.parse_args(given)  # prints help or the error, and exits
    module = importlib.import_module(VERBS[given[0]][0])
    verb_parser = Parser(prog=f"posterior {given[0]}", description=VERBS[given[0]][1])
    module.add_arguments(verb_parser)
    module.run(verb_parser.parse_args(given[1:]))


def explain(error: Exception) -> tuple[int, str]:
    """(exit status, one line) for any error of a verb: what happened and what to do."""
    text = first_line(error)
    if isinstance(error, PosteriorError):
        return 2, str(error)
    if isinstance(error, BrokenExecutor):
        return 2, "a worker process was killed, most often because memory ran out; free some and try again"
    if _out_of_memory(error):
        return 2, f"memory ran out ({text}); use a smaller --batch-size or --max-length, or a machine with more"
    if isinstance(error, OSError):
        name = error.filename if isinstance(error.filename, str) else ""
        way = WAYS_OUT.get(error.errno or 0, "check the path" if name else "check the machine and try again")
        return 2, f"{f'{name}: ' if name else ''}{error.strerror or text}; {way}"
    return 1, f"a fault of ours, {type(error).__name__}: {text}; please report it with {_record(error)}"


def _out_of_memory(error: Exception) -> bool:
    """Also torch's, which has a type of its own on a GPU and none on a CPU."""
    kinds = {each.__name__ for each in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)


def _record(error: Exception) -> str:
    """Where the traceback is: a file that only this user can read, or stderr."""
    report = "".join(traceback.format_exception(error))
    try:
        if os.environ.get(TRACEBACK):
            print(report, file=sys.stderr)
            return "the traceback above"
        with tempfile.NamedTemporaryFile("w", prefix="posterior-", suffix=".log", delete=False) as file:
            file.write(report.encode(errors="backslashreplace").decode())
    except OSError:
        return f"its traceback, which {TRACEBACK}=1 prints"
    return f"its traceback in {file.name}"


def _terminate(*_: Any) -> NoReturn:
    """SIGTERM ends the verb like an error, so that what it was writing is cleaned up."""
    raise SystemExit(143)


def _open_streams() -> None:
    """Streams that were closed lead nowhere (else the next file to be opened would be taken for stdout), and a
    character that the terminal does not know is written as its escape."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _close_stdout() -> None:
    """What could not be written now cannot be at exit either, where Python would complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # a stream of tests has no number
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if multiprocessing.current_process().name != "MainProcess":
    logs.start()  # a process that this command started, and which imports it first: an engine, a worker

if __name__ == "__main__":
    sys.exit(main())
