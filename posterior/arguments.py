"""Arguments that several verbs have in common."""

from __future__ import annotations

import argparse

import torch

from posterior.data import ROWS


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
        help=r"how a row becomes a prompt, e.g. '{text}\nSentiment:' (\n is a line break)",
    )
    parser.add_argument(
        "--answers",
        nargs="+",
        help="candidate answers, each with its leading space if it has one: ' negative' ' positive'",
    )
    parser.add_argument("--chat", action="store_true", help="send the prompt through the base's chat template")
    parser.add_argument(
        "--base", help="HF folder, .gguf file or org/name@revision (default: SmolLM2-135M-Instruct from PyPI)"
    )


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
