"""What outcomes say of a posterior's answers, by predictive and kind of question: how good they were, whether they have
moved, and whether the promises of their calibration still hold.

Everything is computed anew of the newest answers and outcomes in the store, so that a server that has just started says
the same as one that was there all the time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from pydantic import ValidationError

from posterior.calibration import records, rightness
from posterior.calibration.drift import FAMILIARITY, Drift, Reference, drift, histogram
from posterior.calibration.exchangeability import Evidence, evidence, scores
from posterior.calibration.familiarity import adapter_of
from posterior.calibration.metrics import Estimate
from posterior.calibration.records import Key, PredictiveName, Record
from posterior.calibration.rightness import Features, TextKey, TextRecord
from posterior.calibration.rolling import Bin, Labelled, figures, promised, reliability
from posterior.models.devices import Dtype
from posterior.storage.artefact import Posterior
from server.store.reading import Newest, Stored

Sample = Literal["all", "requested"]
Of = Literal["confidence", "entropy", "familiarity"]
Place = tuple[str, str]  # predictive and kind of question

NO_RECORD = "no calibration belongs to these answers"
NO_HISTOGRAMS = "the calibration was made by an earlier version, without histograms; calibrate again"
NO_RISK = "the calibration does not tell how often its rows were wrong (vector, or an earlier version)"
NO_LABELS = "no label that the server asked for (--label-share) has come since the calibration"


@dataclass(frozen=True)
class Figures:
    """Of n outcomes: what they say, what was promised, the reliability diagram (posterior/calibration/rolling.py)."""

    n: int
    found: Mapping[str, Estimate]
    promised: Mapping[str, float]
    reliability: Sequence[Bin]


@dataclass(frozen=True)
class Learnt:
    """Of the answers of one kind by one predictive.

    figures: of all outcomes of the window, and of those whose labels the server had asked for. requested, reported: how
    many labels were asked for among the answers of the window, and how many of these came. missing: why there is no
    drift, or no evidence against exchangeability.
    """

    predictive: str
    kind: str
    figures: Mapping[Sample, Figures]
    requested: int
    reported: int
    drift: Mapping[Of, Drift]
    evidence: Evidence | None
    missing: Mapping[Literal["drift", "exchangeability"], str]


def learnt(posterior: Posterior, newest: Newest, dtype: Dtype) -> list[Learnt]:
    """What the newest answers and outcomes of a posterior say. dtype: of the engine."""
    seen, known, asked = (_placed(each) for each in (newest.answers, newest.outcomes, newest.requested))
    return [
        _learnt(posterior, place, seen.get(place, []), known.get(place, []), asked.get(place, []), dtype)
        for place in sorted(seen.keys() | known.keys() | asked.keys())
    ]


def _placed(rows: Sequence[Stored]) -> dict[Place, list[Stored]]:
    found: dict[Place, list[Stored]] = {}
    for row in rows:
        found.setdefault((row.predictive, row.kind), []).append(row)
    return found


def _learnt(
    posterior: Posterior,
    place: Place,
    seen: Sequence[Stored],
    known: Sequence[Stored],
    asked: Sequence[Stored],
    dtype: Dtype,
) -> Learnt:
    parts: dict[Sample, Sequence[Stored]] = {"all": known, "requested": [row for row in known if row.requested]}
    missing: dict[Literal["drift", "exchangeability"], str] = {}
    moved, against = _drift(posterior, seen, dtype), _evidence(posterior, asked)
    if isinstance(moved, str):
        missing["drift"] = moved
    if isinstance(against, str):
        missing["exchangeability"] = against
    return Learnt(
        *place,
        figures={name: _figures(rows) for name, rows in parts.items() if rows},
        requested=sum(row.requested for row in seen),
        reported=sum(row.requested and row.reported is not None for row in seen),
        drift=_familiar(posterior, seen, dtype) if isinstance(moved, str) else moved,
        evidence=None if isinstance(against, str) else against,
        missing=missing,
    )


def _figures(rows: Sequence[Stored]) -> Figures:
    labelled = [_labelled(row) for row in rows]
    return Figures(len(rows), figures(labelled), promised(labelled), reliability(labelled))


def _labelled(row: Stored) -> Labelled:
    """An outcome. One that only says that the answer was wrong, of three options or more, counts as one that the
    prediction set did not hold: the worst that it can mean."""
    covered = None if row.prediction_set is None else row.truth is not None and row.truth in row.prediction_set
    return Labelled(
        right=bool(row.correct),
        confidence=row.confidence,
        covered=covered,
        coverage=row.coverage,
        max_risk=None if row.refusal is not None else row.max_risk,
    )


def record_of(posterior: Posterior, key: Mapping[str, object] | None) -> Record | TextRecord | None:
    """The record that belongs to an answer with this stored key."""
    if key is None:
        return None
    try:
        if "text" in key:
            return rightness.find(posterior.texts, TextKey.model_validate(key))
        return records.find(posterior.calibration, Key.model_validate(key))
    except ValidationError:  # another version stored it
        return None


def _most(posterior: Posterior, rows: Sequence[Stored], at: str) -> tuple[Record | TextRecord, list[Stored]] | None:
    """The record to which most of the rows belong, with those; of a record of outcomes those alone that came after it.
    None where none belongs to any. at: the row's time."""
    found: dict[str, Record | TextRecord] = {}
    own: dict[str, list[Stored]] = {}
    for row in rows:
        record = record_of(posterior, row.key)
        if record is None:
            continue
        name = record.key.file_name
        found[name] = record
        own.setdefault(name, [])
        if record.collected is None or getattr(row, at) > record.collected.until:
            own[name].append(row)
    if not own:
        return None
    [(name, _)] = Counter({name: len(rows) for name, rows in own.items()}).most_common(1)
    return found[name], own[name]


def _drift(posterior: Posterior, seen: Sequence[Stored], dtype: Dtype) -> dict[Of, Drift] | str:
    """How far the answers have moved from the rows of their record, or why that cannot be said."""
    found = _most(posterior, seen, "created")
    if found is None:
        return NO_RECORD
    record, rows = found
    if record.reference is None:
        return NO_HISTOGRAMS
    values = [look for row in rows if (look := look_of(row)) is not None]
    live = Reference.of([confidence for confidence, _ in values], [entropy for _, entropy in values])
    moved: dict[Of, Drift | None] = {
        "confidence": drift(record.reference.confidence, live.confidence),
        "entropy": drift(record.reference.entropy, live.entropy),
    }
    return {name: each for name, each in moved.items() if each is not None} | _familiar(posterior, rows, dtype)


def look_of(row: Stored) -> tuple[float, float] | None:
    """The confidence and the entropy of an answer, as a `Reference` has them."""
    if row.features is not None:
        return math.exp(row.features["mean_logprob"]), row.features["entropy"]
    if row.probability is None or row.total is None:
        return None
    return max(row.probability), row.total


def _familiar(posterior: Posterior, seen: Sequence[Stored], dtype: Dtype) -> dict[Of, Drift]:
    """How far the familiarity of the answers has moved from that of held-out rows, where these tell it."""
    rows = [row for row in seen if row.familiarity is not None]
    if not rows:
        return {}
    known = posterior.familiarity.get((adapter_of(cast(PredictiveName, rows[0].predictive)), dtype))
    if known is None:
        return {}
    live = histogram([row.familiarity for row in rows if row.familiarity is not None], FAMILIARITY)
    found = drift(histogram(known.of_held(), FAMILIARITY), live)
    return {} if found is None else {"familiarity": found}


def _evidence(posterior: Posterior, asked: Sequence[Stored]) -> Evidence | str:
    """Against the exchangeability of labelled answers with the rows of their record, or why there is none."""
    if not asked:
        return NO_LABELS
    found = _most(posterior, asked, "reported")
    if found is None:
        return NO_RECORD
    record, rows = found
    if record.risk is None:
        return NO_RISK
    live = [each for row in reversed(rows) if (each := graded(record, row)) is not None]
    held = scores(record.risk.confidence, record.risk.right)
    against = evidence(held, scores([confidence for confidence, _ in live], [right for _, right in live]))
    return NO_LABELS if against is None else against


def graded(record: Record | TextRecord, row: Stored) -> tuple[float, bool] | None:
    """The confidence of an answer by which the record's `risk` ranks its rows, and whether what it is about was right;
    None where that is not known."""
    if isinstance(record, TextRecord):
        if row.features is None:
            return None
        return float(record.guard(record.guard.table([cast(Features, row.features)]))), bool(row.correct)
    if row.probability is None:
        return None
    p = torch.tensor(row.probability, dtype=torch.float64)
    top = int(p.argmax())
    if row.truth is None and top != row.best:  # the answer was wrong, and the predictive's own was another
        return None
    return float(p[top]), top == row.truth
