"""Arguments that several verbs have in common, and how they are checked before any work."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from posterior.data import ROWS
from posterior.errors import PosteriorError
from posterior.task import Task

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a posterior's folder, which is its name when served
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
ESCAPES_HELP = r"\n is a line break, \t a tab, \\ a backslash"


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; with `above`, not `low` itself. Neither NaN nor infinity is in any."""

    low: float
    high: float = sys.float_info.max
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.low:.10g}"
        return low if self.high == sys.float_info.max else f"{low} and at most {self.high:.10g}"


POSITIVE = Range(0, above=True)
SIZES = {"batch_size": Range(1, 2**16), "particles": Range(1, 1000)}  # of evaluate and calibrate


def add_task(parser: argparse.ArgumentParser, *, template: str | None) -> None:
    """What the posterior is for, and on which base; without a default `template` it must be given."""
    parser.add_argument(
        "--out", required=True, help="the posterior folder to write; its name is the model's name when served"
    )
    parser.add_argument(
        "--task", choices=("choice", "text"), default="choice", help="choice: pick one of some answers; text: write one"
    )
    parser.add_argument(
        "--template",
        default=template,
        required=template is None,
        help=rf"how a row becomes a prompt, e.g. '{{text}}\nSentiment:' ({ESCAPES_HELP}; {{{{ and }}}} are braces)",
    )
    parser.add_argument(
        "--answers",
        nargs="+",
        help=f"candidate answers, each with its leading space if it has one: ' negative' ' positive' ({ESCAPES_HELP})",
    )
    parser.add_argument("--chat", action="store_true", help="send the prompt through the base's chat template")
    parser.add_argument(
        "--base", help="HF folder, .gguf file or org/name@revision (default: SmolLM2-135M-Instruct from PyPI)"
    )


def task(args: argparse.Namespace) -> Task:
    """The task that the options describe. Raises PosteriorError."""
    answers = None if args.answers is None else tuple(unescaped("--answers", answer) for answer in args.answers)
    return Task(args.task, unescaped("--template", args.template), answers, args.chat)


def unescaped(option: str, text: str) -> str:
    """The text that an option's value means: ESCAPES are read, every other backslash is an error."""
    unknown = next((found for found in re.findall(r"\\.?", text, re.DOTALL) if found not in ESCAPES), None)
    if unknown is not None:
        raise PosteriorError(f"{option} holds {unknown} in {text!r}; {ESCAPES_HELP}, so write \\{unknown} for it")
    return re.sub(r"\\.", lambda found: ESCAPES[found[0]], text)


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """How a posterior is run over rows, and in which form the result is printed."""
    parser.add_argument("--base", help="where the base model is now (default: by the id in the posterior)")
    parser.add_argument(
        "--batch-size", type=int, default=ROWS, help="rows a forward pass, at most (default %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the base's weights (default %(default)s)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def warn(*lines: str) -> None:
    """Print what the user should look at."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def check_numbers(args: argparse.Namespace, ranges: Mapping[str, Range]) -> None:
    """Raises PosteriorError for an option that is given and out of its range."""
    for name, allowed in ranges.items():
        value = getattr(args, name)
        if value is not None and value not in allowed:
            raise PosteriorError(f"--{name.replace('_', '-')} is {value}; it must be {allowed}")


def check_device(device: str) -> None:
    """Raises PosteriorError for a device that this machine does not have."""
    kind = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", device)
    if kind is None:
        raise PosteriorError(f"--device is {device!r}; it must be cpu, cuda, or one GPU such as cuda:1")
    if device.startswith("cuda") and int(kind[1] or 0) >= torch.cuda.device_count():
        raise PosteriorError(f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here; use --device cpu")


def check_out(out: str) -> None:
    """Raises PosteriorError for a folder that cannot be written, or whose name cannot be a model's."""
    path = Path(out)
    if not NAME.fullmatch(path.name):
        raise PosteriorError(
            f"--out {out!r}: the folder's name is the model's name when served; end it with a name of letters, digits, "
            "'.', '_' and '-', such as posteriors/reviews"
        )
    try:
        present = next(place for place in (path, *path.absolute().parents) if place.exists() or place.is_symlink())
    except OSError as error:
        raise PosteriorError(f"--out {out!r}: {error.strerror}; name another place") from None
    if not present.is_dir():
        raise PosteriorError(f"--out {out!r}: {present} is a file, not a folder; name another place")
    holder = present.absolute().parent if present == path else present
    if not os.access(holder, os.W_OK | os.X_OK):
        raise PosteriorError(f"--out {out!r}: no permission to write in {holder}; name another place")
