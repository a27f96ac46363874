"""`posterior calibrate`: of choices by the library alone, of text with the engine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast, get_args

from tqdm import tqdm

from posterior.calibration.rightness import Graded, TextKey, TextRecord, check_count, measure
from posterior.cli import arguments, options
from posterior.cli import calibrate as choices
from posterior.data.examples import Example, data_hash
from posterior.data.graded import HELP, GradedRow, encode
from posterior.data.reading import read_rows
from posterior.data.task import Kind, Tokenizer
from posterior.data.tokens import continuation
from posterior.errors import PosteriorError
from posterior.evaluation.calibrate import PARTICLES, Calibration
from posterior.evaluation.report import markdown_rows
from posterior.models.base import cache_folder, load_tokenizer, resolve
from posterior.models.devices import Dtype
from posterior.storage import artefact
from posterior.storage.artefact import Posterior
from server.calibrate import outcomes
from server.calibrate.grading import described
from server.calibrate.observing import Observation, Observed, observe
from server.calibrate.outcomes import OutcomeCalibration
from server.calibrate.settings import TextCalibration
from server.configuration.schema import ServeSettings
from server.console import quiet, say
from server.engine.compat import contract
from server.engine.config import set_environment
from server.errors import RequestError
from server.main import checked_device, comparers, start_engine
from server.metrics import Metrics
from server.services import meanings, registry
from server.services.predictive import Service
from server.workers.comparer import Comparer

S = TypeVar("S", Calibration, TextCalibration, OutcomeCalibration)
SETTINGS: Mapping[str, type] = {
    "choice": Calibration, "text": TextCalibration, "outcomes": OutcomeCalibration,
}  # fmt: skip
SHOWN = ("accuracy", "auroc", "ece", "nll")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices.add_arguments(parser, SETTINGS)
    parser.description = (
        f"{parser.description} With --task text: how probably the texts that it writes are right, learnt from {HELP}."
    )
    parser.add_argument(
        "--task",
        choices=get_args(Kind),
        help="text: the probability that a text is right, for any posterior (default: the posterior's own task)",
    )
    parser.add_argument(
        "--from-outcomes",
        metavar="URL|FILE",
        help="instead of rows: what outcomes said of answers that the server has kept (`posterior serve --outcomes`)",
    )
    parser.add_argument("--verbose", action="store_true", help="text: on a terminal, show what vLLM and torch say")


def run(args: argparse.Namespace) -> None:
    posterior = artefact.load(args.posterior)
    kind = args.task or posterior.task.kind
    if kind not in ("text", posterior.task.kind):
        raise PosteriorError(
            f"{posterior.name!r} is a posterior of a {posterior.task.kind}; leave --task out, or give --task text for "
            "what it writes"
        )
    if args.from_outcomes is not None:
        return _from_outcomes(posterior, args, kind)
    if kind != "text":
        return choices.run(args, settings(Calibration, args))
    if args.data is None:
        raise PosteriorError("the graded rows are missing; name a file of them after the posterior")
    for record, path in calibrate(posterior, args, settings(TextCalibration, args)):
        _show(record, path, args)


def _from_outcomes(posterior: Posterior, args: argparse.Namespace, kind: Kind) -> None:
    """Records of what outcomes said, written and printed. Raises PosteriorError."""
    if args.data is not None:
        raise PosteriorError("a calibration is made of rows or of outcomes; give a file, or --from-outcomes")
    posterior.check_open()
    chosen = settings(OutcomeCalibration, args)
    found = outcomes.made(
        posterior, outcomes.read(args.from_outcomes, posterior, chosen), chosen, "text" if kind == "text" else "choice"
    )
    for note in found.notes:
        print(f"posterior: {note}", file=sys.stderr)
    for record in found.choices:
        choices.show(record, posterior.add(record), as_json=args.json)
    for text in found.texts:
        _show(text, posterior.add_text(text), args)


def _show(record: TextRecord, path: Path, args: argparse.Namespace) -> None:
    """Prints a table, or a line of JSON."""
    print(json.dumps(record.model_dump(mode="json")) if args.json else f"{shown(record)}\n\nwrote {path}\n")


@arguments.in_options
def settings(kind: type[S], args: argparse.Namespace) -> S:
    """The settings that the options ask for. Raises PosteriorError."""
    name = next(name for name, cls in SETTINGS.items() if cls is kind)
    found: S = options.build(name, SETTINGS, options.given(args, SETTINGS), "--task")
    return found


def calibrate(
    posterior: Posterior, args: argparse.Namespace, settings: TextCalibration
) -> list[tuple[TextRecord, Path]]:
    """Records of the texts that the posterior writes, and where each was written. Raises PosteriorError."""
    posterior.check_open()
    contract.check_version()
    base = resolve(args.base or posterior.base_spec)
    posterior.check_base(base.hash)
    tokenizer = load_tokenizer(base)
    rows = read_rows(args.data)
    graded = encode(posterior.task, tokenizer, rows, source=args.data)
    check_count(len(graded))
    _check_unseen(posterior, tokenizer, graded)
    particles = _particles(posterior, settings)
    with quiet(cache_folder() / "logs" / "calibrate.log", args.verbose):
        observed, dtype, meaning = asyncio.run(_observed(posterior, args.base, graded, settings))
    key = TextKey(
        base=base.hash,
        posterior=posterior.hash,
        predictive=settings.predictive,
        particles=particles,
        dtype=dtype,
        text="greedy",
    )
    return [
        (record, posterior.add_text(record))
        for record in records(key, observed, data_hash(rows), settings, graded, meaning)
    ]


def records(
    key: TextKey,
    observed: Sequence[Observation],
    data: str,
    settings: TextCalibration,
    rows: Sequence[GradedRow],
    meaning: str,
) -> list[TextRecord]:
    """Of the texts as they are and, where there are samples, of the same with these, and of the samples that stand for
    the most probable meanings. `meaning`: what tells these apart."""
    given = rows[0].given is not None
    parts: list[tuple[TextKey, list[Observed]]] = [
        (key.model_copy(update={"text": "given" if given else "greedy"}), [each.greedy for each in observed])
    ]
    sampled = {"samples": settings.samples, "meaning": meaning}
    for text in ("sampled", "meaning"):
        found = [one for each in observed if (one := getattr(each, text)) is not None]
        if found:
            kind = {"text": "meaning"} if text == "meaning" else {}
            parts.append((key.model_copy(update={**sampled, **kind}), found))
    return [
        measure(
            Graded([one.features for one in each], [one.right for one in each]),
            key=own,
            data=data,
            grading="given" if given else described(settings.grading),
            max_tokens=None if given else settings.max_tokens,
        )
        for own, each in parts
    ]


def shown(record: TextRecord) -> str:
    """A table of what the record is worth."""
    key = record.key
    what = {"greedy": "texts at temperature 0", "meaning": "texts of the most probable meaning", "given": "given texts"}
    samples = "" if key.samples is None else f", with the meanings ({key.meaning}) of {key.samples} samples"
    before = ["mean token probability", *(str(record.before.get(name, "-")) for name in SHOWN)]
    after = ["P(right), cross-fitted", *(str(record.after.get(name, "-")) for name in SHOWN)]
    table = markdown_rows([["confidence", *SHOWN], before, after])
    return f"{what[key.text]}{samples} (n = {record.n}, {record.grading})\n\n{table}"


def _particles(posterior: Posterior, settings: TextCalibration) -> int:
    if settings.predictive == "map":
        return 1
    if settings.particles is not None:
        return len(posterior.order(settings.particles))
    return len(posterior.weights) if posterior.family == "particles" else PARTICLES


def _check_unseen(posterior: Posterior, tokenizer: Tokenizer, rows: Sequence[GradedRow]) -> None:
    """Raises PosteriorError for rows that the posterior was fitted on."""
    end = cast(int, getattr(tokenizer, "eos_token_id", None))  # text tasks need one
    examples = [
        Example(row.prompt, ((*continuation(tokenizer, text), end),), 0)
        for row in rows
        for text in row.accepted or ()
    ]  # fmt: skip
    seen = posterior.trained_on(examples)
    if seen:
        raise PosteriorError(
            f"{seen} accepted answers are answers that {posterior.name!r} was fitted on; calibrate on other rows"
        )


async def _observed(
    posterior: Posterior, base: str | None, rows: Sequence[GradedRow], settings: TextCalibration
) -> tuple[list[Observation], Dtype, str]:
    """What the engine makes of the rows, the dtype it computes in, and what tells meanings apart."""
    with contextlib.ExitStack() as stack:
        service = await started(posterior, base, settings, stack)
        served = service.find(posterior.name)
        with tqdm(total=len(rows), desc="answers", unit="row") as progress:
            found = await observe(service, served, rows, settings, lambda: progress.update())
        return found, cast(Dtype, service.engine.dtype), meanings.identity(service, settings.meaning)


async def started(
    posterior: Posterior, base: str | None, settings: TextCalibration, stack: contextlib.ExitStack
) -> Service:
    """The service of one posterior, whose engine ends with the stack. Raises PosteriorError."""
    device = checked_device(settings.device or "auto")
    set_environment(device)
    found = resolve(base or posterior.base_spec)
    served = registry.load(
        posterior.path.parent,
        found,
        particles=settings.particles or PARTICLES,
        cache=cache_folder(),
        only=posterior.path.name,
    )
    say("starting vLLM (up to a minute)")
    engine = await start_engine(ServeSettings(dtype=settings.dtype or "auto"), found, device, served)
    stack.callback(engine.stop)
    served = served.without(engine.refused)
    served.check(posterior.path.parent)
    folders = comparers(settings.meaning_embedding, settings.meaning_nli)
    metrics = Metrics()
    comparer = Comparer(folders, settings.meaning_threshold, metrics) if folders else None
    service = Service(served, engine, None, load_tokenizer(found), metrics, comparer)
    if comparer is not None:
        stack.callback(comparer.stop)
        await comparer.start()
    try:
        meanings.check(service, settings.meaning, 1, settings.samples + 1)
    except RequestError as error:
        raise PosteriorError(str(error)) from error
    return service
