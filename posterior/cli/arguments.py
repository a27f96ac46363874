"""Arguments that several verbs have in common."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, get_args

from posterior.cli.options import option
from posterior.data import decisions
from posterior.data.decisions import Labels
from posterior.data.task import Kind, Task
from posterior.errors import PosteriorError
from posterior.settings import SettingError

Given = ParamSpec("Given")
Result = TypeVar("Result")

ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
ESCAPES_HELP = r"\n is a line break, \t a tab, \\ a backslash"


def add_task(parser: argparse.ArgumentParser) -> None:
    """What the posterior is for, and on which base."""
    parser.add_argument(
        "--out", required=True, help="the posterior folder to write; its name is the model's name when served"
    )
    parser.add_argument(
        "--task",
        choices=get_args(Kind),
        default="choice",
        help="choice: pick one of some answers; decision: typed questions, each row its own; text: write one",
    )
    parser.add_argument(
        "--template",
        help=rf"how a row becomes a prompt, e.g. '{{text}}\nSentiment:' ({ESCAPES_HELP}; {{{{ and }}}} are braces)",
    )
    parser.add_argument(
        "--answers",
        nargs="+",
        help=f"candidate answers, each with its leading space if it has one: ' negative' ' positive' ({ESCAPES_HELP})",
    )
    parser.add_argument(
        "--question",
        help="decision: what rows of `text` and `label` are asked; --answers are its options (without blanks)",
    )
    parser.add_argument(
        "--labels", choices=get_args(Labels), default="words", help="decision: how options are put to the model"
    )
    parser.add_argument("--chat", action="store_true", help="send the prompt through the base's chat template")
    parser.add_argument(
        "--base", help="HF folder, .gguf file or org/name@revision (default: SmolLM2-135M-Instruct from PyPI)"
    )


def task(args: argparse.Namespace, template: str | None = None) -> Task:
    """The task that the options describe; without a default `template`, one must be given for anything but a decision.

    Raises PosteriorError.
    """
    answers = None if args.answers is None else tuple(unescaped("--answers", answer) for answer in args.answers)
    if args.task == "decision":
        template = decisions.TEMPLATE
    if args.template is not None:
        template = unescaped("--template", args.template)
    if template is None:
        raise PosteriorError("--template is missing: how does a row become a prompt? For example '{text}\\nSentiment:'")
    if args.question is None:
        return Task(args.task, template, answers, args.chat, labels=args.labels)
    if args.task != "decision" or answers is None:
        raise PosteriorError("--question belongs to --task decision, with --answers for its options")
    question = decisions.one_choice(unescaped("--question", args.question), answers)
    return Task(args.task, template, None, args.chat, labels=args.labels, question=question)


def unescaped(option: str, text: str) -> str:
    """The text that an option's value means: ESCAPES are read, every other backslash is an error."""
    unknown = next((found for found in re.findall(r"\\.?", text, re.DOTALL) if found not in ESCAPES), None)
    if unknown is not None:
        raise PosteriorError(f"{option} holds {unknown} in {text!r}; {ESCAPES_HELP}, so write \\{unknown} for it")
    return re.sub(r"\\.", lambda found: ESCAPES[found[0]], text)


def add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="where the base model is now (default: by the id in the posterior)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def in_options(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """The same, with settings in its errors called by their options."""

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except SettingError as error:
            raise PosteriorError(error.named(option)) from error

    return call
