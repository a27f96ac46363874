"""A calibration of what outcomes said: `posterior calibrate POSTERIOR --from-outcomes`.

What `max_risk` and prediction sets promise is proved by rows that are like all questions. Outcomes are not: people
report what they looked at, and what went wrong. So only answers count whose labels the server asked for, which chance
alone has chosen (`posterior serve --label-share`). Those whose labels never came count as the worst that they can be.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeVar, cast

import torch
from pydantic import ValidationError

from posterior.calibration.choice import Choice
from posterior.calibration.conformal import MIN_ROWS, Score
from posterior.calibration.measure import measure
from posterior.calibration.metrics import COVERAGE
from posterior.calibration.records import Collected, Key, QuestionKind, Record
from posterior.calibration.rightness import Features, Graded, TextKey, TextRecord
from posterior.calibration.rightness import measure as measure_texts
from posterior.calibration.scalers import Method
from posterior.data.examples import data_hash
from posterior.errors import PosteriorError
from posterior.evaluation.calibrate import by_kind, methods_of
from posterior.evaluation.choosing import Predicted, compare
from posterior.settings import Range, SettingError, Settings, setting
from posterior.storage.artefact import Posterior
from server.configuration.window import DAY
from server.store import database
from server.store.reading import Stored, collected

K = TypeVar("K", Key, TextKey)
R = TypeVar("R", Record, TextRecord)
BIASED = (
    "outcomes come mostly of answers that somebody looked at or that went wrong, and do not show how often all others "
    "are wrong; so they cannot renew what max_risk and prediction sets promise"
)
WAYS_OUT = (
    "Serve with --label-share, so that the server asks for the outcomes of answers that chance chooses, and report "
    "these; or give --confidence-only, which renews the confidence and leaves the promises as they are"
)


@dataclass(frozen=True, kw_only=True)
class OutcomeCalibration(Settings):
    """Which outcomes are used, and how."""

    method: Method | None = setting(None, "as above (default: the one of least cross-fitted NLL)")
    conformal: Score = setting("lac", "prediction sets: lac, the smallest on average; aps, larger where p is spread")
    coverage: float = setting(COVERAGE, "of the sets reported here; requests may ask for any", Range(0, 1))
    days: float | None = setting(
        None, "outcomes: only of answers of the last so many days (default: all)", Range(0, 36500, above=True)
    )
    confidence_only: bool = setting(
        False, "outcomes: renew only the confidence, by all outcomes, and leave what the record promises as it is"
    )

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise SettingError("{coverage} is {value}; it must lie between 0 and 1", value=self.coverage)
        super().__post_init__()


class Made(NamedTuple):
    """Records, each where it belongs; and what is to be said beside them."""

    choices: Sequence[Record]
    texts: Sequence[TextRecord]
    notes: Sequence[str]


def read(source: str, posterior: Posterior, settings: OutcomeCalibration) -> list[Stored]:
    """The answers that count, the oldest first, from a database or a SQLite file. Raises PosteriorError."""
    since = 0.0 if settings.days is None else time.time() - DAY * settings.days
    engine = database.connect(database.existing(source))
    try:
        with engine.connect() as connection:
            return collected(connection, posterior.hash, since, requested=not settings.confidence_only)
    finally:
        engine.dispose()


def made(
    posterior: Posterior, rows: Sequence[Stored], settings: OutcomeCalibration, kind: Literal["choice", "text"]
) -> Made:
    """The records that the rows make of choices, or of texts. Raises PosteriorError where they make none."""
    until = time.time()
    notes: list[str] = []
    choices: list[Record] = []
    texts: list[TextRecord] = []
    if kind == "text":
        for text_key, part in _grouped(TextKey, rows):
            if _enough(text_key.file_name, part, notes):
                texts.append(_text(posterior, text_key, part, settings, until))
    else:
        for key, part in _grouped(Key, rows):
            for own, each in _kinds(key, part):
                if _enough(own.file_name, each, notes):
                    choices.append(_choice(posterior, own, each, settings, until))
    if not choices and not texts:
        raise PosteriorError(_nothing(notes, settings))
    return Made(choices, texts, notes)


def _grouped(kind: type[K], rows: Sequence[Stored]) -> Iterator[tuple[K, list[Stored]]]:
    """The rows that a calibration can be of, by what it belongs to: of decisions without the kind of question."""
    found: dict[K, list[Stored]] = {}
    for row in rows:
        try:
            key = kind.model_validate(row.key)
        except ValidationError:  # none, that of something else, or of another version
            continue
        if isinstance(key, Key):
            key = key.model_copy(update={"question": None})
        found.setdefault(key, []).append(row)
    yield from found.items()


def _kinds(key: Key, rows: Sequence[Stored]) -> Iterator[tuple[Key, list[Stored]]]:
    """The rows of each record: of decisions by the kind of question, as `posterior calibrate` has it."""
    asked = [cast(QuestionKind | None, (row.key or {}).get("question")) for row in rows]
    if any(question is None for question in asked):
        yield key, list(rows)
        return
    for kind, part in by_kind([question for question in asked if question is not None]).items():
        yield key.model_copy(update={"question": kind}), [rows[index] for index in part]


def _enough(name: str, rows: Sequence[Stored], notes: list[str]) -> bool:
    """Whether the rows are enough for a record; notes what is to be said."""
    came = sum(row.correct is not None for row in rows)
    missing = len(rows) - came
    if came < MIN_ROWS:
        notes.append(f"{name}: {came} outcomes are too few, it takes {MIN_ROWS}")
        return False
    if missing:
        notes.append(
            f"{name}: {missing} of {len(rows)} outcomes that were asked for have not come; what is promised counts "
            "them as wrong answers"
        )
    return True


def _nothing(notes: Sequence[str], settings: OutcomeCalibration) -> str:
    if settings.confidence_only:
        return f"no record can be made: {'; '.join(notes) or 'no outcomes are of answers that a calibration can be of'}"
    if notes:
        return f"{'; '.join(notes)}. Only outcomes that the server asked for count: {BIASED}. {WAYS_OUT}"
    return f"the server has asked for no outcome of this posterior's answers, and {BIASED}. {WAYS_OUT}"


def _choice(
    posterior: Posterior, key: Key, rows: Sequence[Stored], settings: OutcomeCalibration, until: float
) -> Record:
    """The record of rows of options. Raises PosteriorError."""
    known = [row for row in rows if row.correct is not None]
    unsaid = sum(row.truth is None for row in known)
    if unsaid:
        raise PosteriorError(
            f"{key.file_name}: {unsaid} outcomes say that the answer was wrong and not what was true; delete them and "
            "report `answer`, the true option. Without them all others would look better than they are"
        )
    widths = [len(row.probability or ()) for row in known]
    p = torch.zeros(len(known), max(widths), dtype=torch.float64)
    for index, row in enumerate(known):
        p[index, : widths[index]] = torch.tensor(row.probability, dtype=torch.float64)
    y = torch.tensor([row.truth for row in known])
    missing = torch.tensor([max(row.probability or (1.0,)) for row in rows if row.correct is None], dtype=torch.float64)
    data = data_hash([{"id": row.id, "item": row.item, "truth": row.truth} for row in known])
    methods = (settings.method,) if settings.method else methods_of(posterior.task)
    predicted = {key.predictive: Predicted(p, 1, key.dtype)}
    compared = compare(predicted, y, {key.question: range(len(known))}, widths, methods)
    method = Choice.of(compared, posterior=posterior.hash, n=len(known), data=data).method
    fit = partial(
        measure, p, y, method=method, score=settings.conformal, coverage=settings.coverage, key=key, data=data,
        widths=widths,
    )  # fmt: skip
    if not settings.confidence_only:
        return fit(missing=missing, collected=Collected(requested=len(rows), missing=len(missing), until=until))
    old, new = _old(posterior.calibration, key), fit()
    return old.model_copy(
        update={
            "calibrator": new.calibrator, "data": data, "before": new.before, "after": new.after,
            "collected": _confidence_only(old.collected),
        }
    )  # fmt: skip


def _text(
    posterior: Posterior, key: TextKey, rows: Sequence[Stored], settings: OutcomeCalibration, until: float
) -> TextRecord:
    """The record of texts. Raises PosteriorError."""
    known = [row for row in rows if row.correct is not None and row.features is not None]
    missing = [cast(Features, row.features) for row in rows if row.correct is None and row.features is not None]
    graded = Graded([cast(Features, row.features) for row in known], [bool(row.correct) for row in known])
    data = data_hash([{"id": row.id, "item": row.item, "correct": row.correct} for row in known])
    fit = partial(measure_texts, graded, key=key, data=data, grading="outcomes")
    if not settings.confidence_only:
        own = Collected(requested=len(rows), missing=len(missing), until=until)
        return fit(missing=missing, collected=own)
    old, new = _old(posterior.texts, key), fit()
    return old.model_copy(
        update={
            "model": new.model, "data": data, "grading": new.grading, "before": new.before, "after": new.after,
            "collected": _confidence_only(old.collected),
        }
    )  # fmt: skip


def _old(known: Mapping[K, R], key: K) -> R:
    """The record whose promises stay. Raises PosteriorError where there is none."""
    if key not in known:
        raise PosteriorError(
            f"there is no record {key.file_name} whose promises could stay; calibrate with rows first, or leave out "
            "--confidence-only"
        )
    return known[key]


def _confidence_only(old: Collected | None) -> Collected:
    """What is said of a record that got a new confidence: its promises stay of those rows that they are of."""
    return (old or Collected(requested=0, missing=0, until=0.0)).model_copy(update={"confidence_only": True})
