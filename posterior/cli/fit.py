"""`posterior fit`: data (and optionally somebody's PEFT adapter) in, a posterior folder out."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from posterior.cli import arguments, options
from posterior.cli.arguments import add_task, warn
from posterior.data import base_check
from posterior.data.examples import Example, data_hash, encode
from posterior.data.reading import FORMATS, read_rows
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.laplace import gaussian, scale
from posterior.models import adalora, lora, pissa, servable
from posterior.models.base import Base, context, load_model, load_tokenizer, resolve
from posterior.particles import blob, dropout, ensemble, svgd, swag, tfb
from posterior.storage import artefact
from posterior.training.job import EPOCHS, EVIDENCE, PRECISION, Job, Result, number
from posterior.training.map import Checkpoint

SHOWN = 200  # characters of a prompt
LONGEST = 1024  # tokens of a row, where nothing says how many
METHODS: dict[str, Callable[[Job], Result]] = {
    "laplace": gaussian.fit,
    "ensemble": ensemble.fit,
    "svgd": svgd.fit,
    "dropout": dropout.fit,
    "swag": swag.fit,
    "blob": blob.fit,
    "tfb": tfb.fit,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Fit a posterior over LoRA adapters to labelled rows."
    parser.register("action", None, options.Given)
    parser.register("action", "store_true", options.Flag)
    parser.add_argument(
        "data",
        help=f'training rows, {FORMATS}: {{"text": ..., "label": 1}} for a choice; {{"messages": [...]}} for text',
    )
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        default="laplace",
        help="laplace (default): a Gaussian around one adapter. The others end in particles; ensemble: adapters "
        "trained one by one; svgd: trained together, repelling each other; dropout: one adapter under random masks; "
        "swag: the path of the optimiser; blob: a variational Gaussian on A; tfb: --adapter with as much noise as the "
        "data allow",
    )
    add_task(parser, template="{text}")
    parser.add_argument(
        "--adapter",
        type=Path,
        help="laplace or tfb of this trained PEFT adapter, LoRA or AdaLoRA, instead of training one (data: what it was "
        "trained on)",
    )
    group = parser.add_argument_group("LoRA and training")
    group.add_argument("--rank", type=int, default=8, help="rank r of A and B (default %(default)s)")
    group.add_argument("--alpha", type=int, default=16, help="update scale s = alpha / r (default %(default)s)")
    group.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(r) instead")
    group.add_argument(
        "--init",
        choices=("random", "pissa"),
        default="random",
        help="where training starts: at B = 0 (default) or, for ensemble, dropout and swag, at the r principal "
        "components of the base's matrices, which makes an adapter of rank 2 r",
    )
    group.add_argument(
        "--targets", nargs="+", default=list(lora.DEFAULT_TARGETS), help="module names to adapt (default q_proj v_proj)"
    )
    group.add_argument("--dropout", type=float, default=0.0, help="LoRA dropout while training (default %(default)s)")
    group.add_argument(
        "--learning-rate", type=float, default=1e-3, help="peak of Adam's schedule (default %(default)s)"
    )
    group.add_argument(
        "--epochs",
        type=_epochs,
        help=f"passes over the data: a number (default {EPOCHS}), or evidence (default of laplace where answers have "
        f"several tokens): {EPOCHS}, or half or twice as many, each time anew, as long as the evidence rises",
    )
    group.add_argument("--steps", type=int, help="stop after this many optimiser steps instead")
    group.add_argument("--batch-size", type=int, default=8, help="examples a step (default %(default)s)")
    group.add_argument(
        "--max-length",
        type=int,
        help=f"longest row in tokens; longer ones are an error (default {LONGEST}, or the base's context if shorter)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="fixes initialisation, data order, dropout and sampled labels"
    )
    group.add_argument(
        "--prior-precision",
        help="of B: evidence (default) or heldout, both for laplace only, or a number to hold fixed "
        f"(default of the other methods: {PRECISION:g})",
    )
    group.add_argument(
        "--scale",
        help="what a choice's scores are multiplied by before the softmax: evidence (default of laplace where answers "
        "have several tokens), or a number (default 1)",
    )
    group = parser.add_argument_group("particles (every method but laplace)")
    group.add_argument("--particles", type=int, default=8, help="how many adapters (default %(default)s)")
    group.add_argument(
        "--kernel",
        choices=svgd.KERNELS,
        default="layer",
        help="what svgd measures distances between: all parameters, those of each layer (default), or each layer's "
        "product BA",
    )
    group.add_argument(
        "--temperature", type=float, default=1.0, help="svgd: of the posterior, p^(1/T) (default %(default)s)"
    )
    group.add_argument(
        "--no-repulsion", action="store_true", help="svgd without the particles' repulsion, to see what it buys"
    )
    group.add_argument(
        "--tolerance",
        type=float,
        default=0.003,
        help="tfb: share by which the noise may raise the negative log-likelihood (default %(default)s)",
    )
    group = parser.add_argument_group("Laplace (--method laplace)")
    group.add_argument(
        "--structure",
        choices=("kfac", "full", "diagonal"),
        default="kfac",
        help="of the curvature: each matrix's Kronecker factors (default); for the linearised predictive that of all "
        "matrices together; or each matrix's diagonal alone",
    )
    group.add_argument(
        "--last-layer",
        action="store_true",
        help="only the last layer's matrices are uncertain, the others stay at theta*",
    )
    group.add_argument(
        "--grouping",
        choices=("scalar", "layer"),
        default="scalar",
        help="one prior precision for all B (default) or, by blocks, one for each; A keeps that of its initialisation",
    )
    group.add_argument(
        "--no-variational",
        action="store_true",
        help="plain MAP and Laplace: theta* is a mode instead of the mean of a variational Gaussian",
    )
    group.add_argument("--heldout", type=Path, help="rows for --prior-precision heldout, like the data")
    group.add_argument(
        "--sharing",
        choices=("expand", "reduce"),
        default="expand",
        help="how KFAC treats positions (default %(default)s)",
    )
    group.add_argument(
        "--curvature-rank",
        type=_rank,
        default=32,
        help="keep the large factors in this rank plus an isotropic remainder, or 'whole' (default %(default)s)",
    )
    group.add_argument(
        "--label-samples",
        type=int,
        default=1,
        help="sampled labels a row for a text task's Fisher (default %(default)s)",
    )
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the base's weights (default: bfloat16 on CUDA, else float32)",
    )
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")


def run(args: argparse.Namespace) -> None:
    try:
        posterior = fit(args)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise PosteriorError(
            f"the disk of {args.out} is full; free some space and run the same command again: it goes on from the last "
            "checkpoint, and an older posterior at that place is untouched"
        ) from None
    print(
        f"wrote {posterior.path} ({posterior.name}@{posterior.hash[:12]}); "
        f"try `posterior evaluate {args.out} DATA` or `posterior serve`"
    )


def fit(args: argparse.Namespace) -> artefact.Posterior:
    """Everything from rows to the written folder. Raises PosteriorError for whatever the user can mend."""
    args = options.with_defaults(args)
    options.check(args)
    out = artefact.destination(args.out)
    started = time.monotonic()
    task = arguments.task(args)
    rows = read_rows(args.data)
    held = read_rows(args.heldout) if args.heldout else []
    base = resolve(args.base)
    tokenizer: Any = load_tokenizer(base)
    longest = _longest(args, base)
    encoded = partial(encode, task, tokenizer, longest=longest, limit=f"--max-length {longest}")
    examples, heldout = encoded(rows, source=args.data), encoded(held, source=args.heldout)
    print(*shown(tokenizer, task, examples[0]), sep="\n", file=sys.stderr)
    _check_rows(args, task, examples, heldout)
    checkpoint = Checkpoint(out.parent / f".{out.name}.checkpoint", _fingerprint(args, rows, base))
    with checkpoint.held():
        model = _model(base, args, tokenizer, task)
        args = _by_evidence(args, examples)
        task = replace(task, scale=_scale(args, model, examples))
        examples, heldout = ([replace(row, scale=task.scale) for row in part] for part in (examples, heldout))
        job = Job(model, examples, heldout, args, checkpoint)
        result = METHODS[args.method](job)
        record = {"data": {"rows": len(rows), "hash": data_hash(rows)}, "seconds": round(time.monotonic() - started, 1)}
        return artefact.save(
            out,
            base={"id": base.id, "revision": base.revision, "hash": base.hash},
            task=task,
            lora_config=lora.config_of(job.model) | {"base_model_name_or_path": base.id},
            rows=examples,
            **vars(replace(result, fit=result.fit | record)),
        )


def _model(base: Base, args: argparse.Namespace, tokenizer: Any, task: Task) -> PeftModel:
    """The base, checked, with a fresh adapter or somebody's."""
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32"))
    if (dtype, args.device, torch.backends.cpu.get_cpu_capability()) == (torch.bfloat16, "cpu", "AVX2"):
        warn(
            "this CPU does not multiply bfloat16 numbers (AVX512-BF16, AMX); --dtype float32 is many times faster here"
        )
    model = load_model(base, dtype, args.device)
    warn(*base_check.check(tokenizer, base_check.scorer(model), task))
    if args.adapter:
        with adalora.ordinary(args.adapter) as folder:
            warn(*lora.other_base(args.adapter, lora.read_config(folder), base.id))
            trained = lora.load_peft(model, folder)
            servable.check_theta(args.adapter, lora.read_adapter(folder))
            return trained
    servable.check_modules("the adapter of --targets", args.targets)
    attach = pissa.attach if args.init == "pissa" else lora.attach
    peft_model = attach(
        model,
        rank=args.rank,
        alpha=args.alpha,
        targets=args.targets,
        dropout=args.dropout,
        rslora=args.rslora,
        seed=args.seed,
        base_id=base.id,
    )
    servable.check_config("the adapter of --rank", lora.config_of(peft_model))
    return peft_model


def _longest(args: argparse.Namespace, base: Base) -> int:
    """Tokens of a row at most."""
    own = context(base)
    if args.max_length is not None and args.max_length > own:
        raise PosteriorError(f"--max-length is {args.max_length}, but the context of base {base.id} is {own} tokens")
    return int(args.max_length or min(LONGEST, own))


def shown(tokenizer: Any, task: Task, example: Example) -> list[str]:
    """The first prompt and what may follow it, as they are read: lines for the user to look at."""
    prompt = repr(tokenizer.decode(example.prompt))
    prompt = prompt if len(prompt) <= SHOWN else f"{prompt[: SHOWN // 2]} ... {prompt[-SHOWN // 2 :]}"
    answers = [repr([tokenizer.decode([token]) for token in tokens])[1:-1] for tokens in example.continuations[:8]]
    more = f" and {len(example.continuations) - 8} more" if len(example.continuations) > 8 else ""
    name = "answers" if task.kind == "choice" else "response"
    listed = "; ".join(answer if len(answer) <= SHOWN else f"{answer[:SHOWN]} ..." for answer in answers)
    return [f"first prompt: {prompt}", f"its {name}, token by token: {listed}{more}"]


def _by_evidence(args: argparse.Namespace, examples: Sequence[Example]) -> argparse.Namespace:
    """The arguments with --scale and --epochs: where laplace trains for answers of several tokens the evidence chooses
    both, unless they were given."""
    several = args.task == "choice" and any(len(tokens) > 1 for row in examples for tokens in row.continuations)
    trained = args.method == "laplace" and several and not args.adapter
    epochs = args.epochs or (EVIDENCE if trained and args.steps is None else EPOCHS)
    return argparse.Namespace(**vars(args) | {"scale": args.scale or (EVIDENCE if trained else "1"), "epochs": epochs})


def _scale(args: argparse.Namespace, model: PeftModel, examples: Sequence[Example]) -> float:
    fixed = number(args.scale)
    return scale.fit(model, examples, args.batch_size) if fixed is None else fixed


def _check_rows(args: argparse.Namespace, task: Task, examples: Sequence[Example], heldout: Sequence[Example]) -> None:
    """What the rows say about each other."""
    if task.answers is not None and len({example.label for example in examples}) == 1:
        same = f"every row has the answer {task.answers[examples[0].label]!r}"
        if number(args.prior_precision) is None:
            raise PosteriorError(
                f"{same}, which is no evidence of a prior; add rows of other answers or give --prior-precision a number"
            )
        warn(f"{same}; the posterior learns to give it, and nothing else")
    known = {(example.prompt, example.continuations) for example in examples}
    again = sum((example.prompt, example.continuations) in known for example in heldout)
    if again:
        warn(
            f"{again} of {len(heldout)} rows of --heldout are training rows too; the prior they choose is too sure of "
            "theta*"
        )


def _rank(text: str) -> int | None:
    """--curvature-rank: a number, or None for the whole factors."""
    if text in ("whole", "0"):
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a rank nor 'whole'")
    return int(text)


def _epochs(text: str) -> int | str:
    """--epochs: a number, or the word."""
    if text != EVIDENCE and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {EVIDENCE!r}")
    return text if text == EVIDENCE else int(text)


def _fingerprint(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], base: Base) -> str:
    chosen = {key: str(value) for key, value in vars(args).items() if key not in ("out", "verb", "given")}
    return hashlib.sha256(
        json.dumps([chosen, data_hash([dict(row) for row in rows]), base.hash], sort_keys=True).encode()
    ).hexdigest()
