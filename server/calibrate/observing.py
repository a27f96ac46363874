"""Answers as the server gives them, with their features, and which of them are right."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from posterior.calibration.rightness import Features, features
from posterior.data import tokens
from posterior.data.graded import GradedRow
from posterior.errors import PosteriorError
from posterior.predictive.meanings import Meanings
from server import metrics
from server.calibrate.grading import graded
from server.calibrate.settings import TextCalibration
from server.engine.gang import Trace
from server.errors import RequestError, first
from server.http.samples import SHOWING, Asked
from server.services.options import TextUncertainty
from server.services.predictive import Service
from server.services.registry import Served
from server.services.semantics import Samples, semantic
from server.services.texts import Writer, predictive_of

AT_ONCE = 16  # rows that vLLM has at a time: enough to fill its batch


@dataclass(frozen=True)
class Observed:
    """An answer: its text, its features, and whether it is right."""

    text: str
    features: Features
    right: bool


@dataclass(frozen=True)
class Observation:
    """What one row came to. greedy: the text at temperature 0, or the one that was given; sampled: the same with the
    features of its samples; meaning: the sample that stands for the most probable meaning. The last two are None
    without samples."""

    greedy: Observed
    sampled: Observed | None = None
    meaning: Observed | None = None


async def observe(
    service: Service,
    served: Served,
    rows: Sequence[GradedRow],
    settings: TextCalibration,
    done: Callable[[], object] = lambda: None,
) -> list[Observation]:
    """Every row's, in order; `done` is called after each. Raises PosteriorError with the row's number."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, row: GradedRow) -> Observation:
        async with room:
            try:
                found = await (_written if row.given is None else _given)(service, served, row, settings)
            except RequestError as error:
                raise PosteriorError(f"row {number}: {error}") from error
        done()
        return found

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(number, row)) for number, row in enumerate(rows, 1)]
    except ExceptionGroup as errors:
        raise first(errors) from errors
    return [task.result() for task in tasks]


def trace(served: Served, settings: TextCalibration) -> Trace:
    """A new trace of a text of what the settings say writes it."""
    if settings.predictive == "map" and served.map is not None:
        return Trace((served.map,), (1.0,), "sequence", explicit=True)
    k = settings.particles or len(served.particles)
    return Trace(served.particles[:k], served.weights[:k], "sequence", explicit=True)


@dataclass(frozen=True)
class Written:
    """What the engine wrote for a prompt: the text at temperature 0 with its trace; the samples with theirs, None if
    there are to be none."""

    text: str
    trace: Trace
    drawn: Trace
    samples: Samples | None
    writer: Writer


async def write(service: Service, served: Served, row: GradedRow, settings: TextCalibration) -> Written:
    """The text and its samples, as the server writes them. Raises RequestError."""
    greedy, drawn = trace(served, settings), trace(served, settings)
    options = TextUncertainty.model_validate(
        {"samples": settings.samples or None, "meaning": settings.meaning, "return": "greedy"}
    )
    writer = Writer(service, served, options, settings.predictive, greedy)
    body = {"model": served.key, "prompt": list(row.prompt), "max_tokens": settings.max_tokens, "seed": settings.seed}
    if settings.stop:
        body["stop"] = list(settings.stop)
    observation = metrics.Observation(service.metrics, "calibrate")
    asked = Asked(writer, drawn, "completion", body, {}, observation)
    if not settings.samples:
        return Written(_text(await asked.write()), greedy, drawn, None, writer)
    try:
        async with asyncio.TaskGroup() as group:
            written, sampled = group.create_task(asked.write()), group.create_task(asked.draw(SHOWING))
    except ExceptionGroup as errors:
        raise first(errors) from errors
    (samples,) = asked.each(sampled.result())
    return Written(_text(written.result()), greedy, drawn, samples, writer)


async def _written(service: Service, served: Served, row: GradedRow, settings: TextCalibration) -> Observation:
    """Of an answer that is still to be written."""
    found = await write(service, served, row, settings)

    async def observed(text: str, features: Features) -> Observed:
        right = await graded(service, settings.grading, row.question, text, row.accepted or ())
        return Observed(text, features, right)

    greedy = await observed(found.text, features_of(found.trace, 0))
    if found.samples is None:
        return Observation(greedy)
    own = await semantic(found.writer, found.samples, found.text)
    whole = await semantic(found.writer, found.samples)
    number, example = whole.examples[0]
    return Observation(
        greedy,
        replace(greedy, features=features_of(found.trace, 0, own.found, own.own)),
        await observed(example, features_of(found.drawn, number, whole.found, 0)),
    )


async def _given(service: Service, served: Served, row: GradedRow, settings: TextCalibration) -> Observation:
    """Of an answer that was given."""
    assert row.given is not None
    text, right = row.given
    ids = tokens.continuation(service.tokenizer, text)
    read = trace(served, settings)
    (rows,) = await service.engine.score_texts([row.prompt], [ids], read)
    return Observation(Observed(text, features(predictive_of(read, rows)), right))


def features_of(trace: Trace, choice: int, found: Meanings | None = None, own: int | None = None) -> Features:
    """The features of a text of the trace, which is choice `choice`."""
    text = trace.text(choice)
    return features(predictive_of(trace, text.rows[: text.delivered]), found, own)


def _text(reply: dict[str, Any]) -> str:
    return str(reply["choices"][0]["text"])
