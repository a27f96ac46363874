"""Arguments that several verbs have in common, and how they are checked before any work."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from posterior.data.examples import ROWS
from posterior.data.task import Task
from posterior.errors import PosteriorError

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


DTYPES = ("float32", "bfloat16", "float16")


def add_evaluation(
    parser: argparse.ArgumentParser, *, dtype: str | None = "float32", default: str = "%(default)s"
) -> None:
    """How a posterior is run over rows, and in which form the result is printed. default: what the help says of
    `dtype`."""
    parser.add_argument("--base", help="where the base model is now (default: by the id in the posterior)")
    parser.add_argument(
        "--batch-size", type=int, default=ROWS, help="rows a forward pass, at most (default %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=dtype,
        help=f"of the base's weights (default {default})",
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
