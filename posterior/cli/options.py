"""Which options of `posterior fit` go together, and which method uses them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from posterior.cli import arguments
from posterior.cli.arguments import POSITIVE, Range
from posterior.errors import PosteriorError
from posterior.training.job import EVIDENCE, MEMBERS, PRECISION, number

TRAINERS = ("laplace", "ensemble", "svgd", "dropout", "swag", "blob")  # methods that can train an adapter
TRAINING = ("rank", "alpha", "rslora", "targets", "dropout", "learning_rate", "epochs", "steps")
KFAC = ("sharing", "curvature_rank")
LAPLACE = ("structure", "last_layer", "grouping", "no_variational", "heldout", "label_samples", *KFAC)
METHODS: dict[str, tuple[str, ...]] = {  # of the options that not every method uses
    **dict.fromkeys((*TRAINING, "prior_precision"), TRAINERS),
    **dict.fromkeys(LAPLACE, ("laplace",)),
    **dict.fromkeys(("kernel", "temperature", "no_repulsion"), ("svgd",)),
    "particles": (*TRAINERS[1:], "tfb"),
    "init": ("ensemble", "dropout", "swag"),
    "tolerance": ("tfb",),
}


NUMBERS = {
    "rank": Range(1, 512),  # of the adapters that vLLM serves
    "alpha": Range(1, 2**20),
    "dropout": Range(0, 0.999),
    "learning_rate": POSITIVE,
    "steps": Range(1, 10**9),
    "batch_size": Range(1, 2**16),
    "max_length": Range(2, 2**31),
    "seed": Range(0, 2**32 - 1),
    "particles": Range(1, MEMBERS),
    "temperature": POSITIVE,
    "tolerance": POSITIVE,
    "curvature_rank": Range(1, 2**20),
    "label_samples": Range(1, 2**16),
}


class Given(argparse.Action):
    """Stores an option, and that it was given: its value may be the default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        namespace.given = (*getattr(namespace, "given", ()), self.dest)


class Flag(Given):
    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, const=True, default=False, **options)


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the prior precision that the method takes when none is given."""
    default = "evidence" if args.method == "laplace" else f"{PRECISION:g}"
    return argparse.Namespace(**vars(args) | {"prior_precision": args.prior_precision or default})


def check(args: argparse.Namespace) -> None:
    """Raises PosteriorError for values out of range, or options that do not go together."""
    _check_values(args)
    _check_method(args)
    _check_given(args)


def _check_values(args: argparse.Namespace) -> None:
    _check_number("--prior-precision", args.prior_precision, ("evidence", "heldout"), "typical values are 1 to 1000")
    if args.scale is not None:
        _check_number("--scale", args.scale, ("evidence",), "1 leaves the scores as they are")
    if args.scale and args.task == "text":
        raise PosteriorError("--scale is of the scores of answers; a text has none, leave it out")
    if (args.prior_precision == "heldout") != bool(args.heldout):
        raise PosteriorError("--prior-precision heldout and --heldout FILE go together; give both or neither")
    if args.prior_precision == "heldout" and args.task == "text":
        raise PosteriorError("--prior-precision heldout needs a choice task; use the evidence for text")
    arguments.check_numbers(args, NUMBERS)
    if args.epochs != EVIDENCE:
        arguments.check_numbers(args, {"epochs": Range(1, 10_000)})
    arguments.check_device(args.device)


def _check_number(option: str, value: str, words: Sequence[str], hint: str) -> None:
    """`value` is one of the words or a positive number."""
    found = number(value)
    if found is None and value not in words:
        raise PosteriorError(f"{option} {value!r} is neither {', '.join(map(repr, words))} nor a number")
    if found is not None and not (math.isfinite(found) and found > 0):
        raise PosteriorError(f"{option} {value} must be positive; {hint}")


def _check_method(args: argparse.Namespace) -> None:
    """What belongs to some methods only."""
    if args.method != "laplace" and number(args.prior_precision) is None:
        raise PosteriorError(
            f"--prior-precision {args.prior_precision} belongs to --method laplace; {args.method} needs a number"
        )
    if args.scale == "evidence" and (args.method != "laplace" or args.adapter):
        raise PosteriorError("--scale evidence is for an adapter that --method laplace trains; give a number")
    if args.epochs == EVIDENCE and args.method != "laplace":
        raise PosteriorError(f"--epochs evidence belongs to --method laplace; {args.method} needs a number")
    if args.epochs == EVIDENCE and args.steps is not None:
        raise PosteriorError("--epochs evidence and --steps both say how long to train; leave one out")
    if args.adapter and args.method not in ("laplace", "tfb"):
        raise PosteriorError(f"--adapter belongs to --method laplace and tfb; {args.method} trains its own adapter")
    if args.method == "tfb" and not args.adapter:
        raise PosteriorError("--method tfb needs the trained adapter that it spreads; give --adapter FOLDER")
    if args.method == "dropout" and args.dropout == 0:
        raise PosteriorError("--method dropout needs a --dropout above 0, for example 0.1")
    if args.method == "laplace" and args.grouping == "layer" and args.structure == "full":
        raise PosteriorError("--grouping layer goes by blocks; give --structure kfac or diagonal with it")


def _check_given(args: argparse.Namespace) -> None:
    """No option that was given is ignored."""
    for name in args.given:
        option, methods = f"--{name.replace('_', '-')}", METHODS.get(name, (args.method,))
        if args.method not in methods:
            raise PosteriorError(f"{option} belongs to --method {', '.join(methods)}; {args.method} does not use it")
        if args.adapter and name in (*TRAINING, "no_variational"):
            raise PosteriorError(f"{option} is for training an adapter, but --adapter is a trained one; leave one out")
        if args.structure == "diagonal" and name in KFAC:
            raise PosteriorError(f"{option} belongs to --structure full or kfac; diagonal does not use it")
