"""The newest answers and outcomes of a posterior, read for what they say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, select

from posterior.data.decisions import Value
from server.configuration.window import MOST, Window
from server.store.tables import answers, outcomes, replies


@dataclass(frozen=True)
class Stored:
    """An answer as it is stored (server/store/values.py), and its outcome: reported, correct and truth are None where
    there is none."""

    owner: str
    id: str
    item: int
    created: float
    kind: str
    predictive: str
    key: Mapping[str, Any] | None
    options: Sequence[Value] | None
    probability: Sequence[float] | None
    best: int | None
    confidence: float | None
    max_risk: float | None
    refusal: str | None
    familiarity: float | None
    total: float | None
    prediction_set: Sequence[int] | None
    coverage: float | None
    features: Mapping[str, float] | None
    requested: bool
    reported: float | None
    correct: bool | None
    truth: int | None


@dataclass(frozen=True)
class Newest:
    """Of one posterior, the newest first: the answers of a window, its outcomes, and of those whose labels were asked
    for the newest MOST, within the window or not."""

    answers: Sequence[Stored]
    outcomes: Sequence[Stored]
    requested: Sequence[Stored]


def newest(connection: Connection, hash: str, window: Window, owner: str | None = None) -> Newest:
    """Those of the posterior with this hash, of all keys or of this owner alone."""
    since, limit = window.since, window.count
    seen = _rows(connection, _own(replies.c, hash, owner), replies.c.created >= since, limit=limit)
    labels = _own(outcomes.c, hash, owner)
    requested = _rows(connection, labels, outcomes.c.requested, limit=MOST, order=outcomes.c.reported)
    others = _rows(
        connection, labels, ~outcomes.c.requested, outcomes.c.reported >= since, limit=limit, order=outcomes.c.reported
    )
    known = [each for each in (*requested, *others) if each.reported is not None and each.reported >= since]
    known.sort(key=lambda each: (each.reported, each.id, each.item), reverse=True)
    return Newest(seen, known[:limit], requested)


def collected(connection: Connection, hash: str, since: float, *, requested: bool) -> list[Stored]:
    """All answers of the posterior since then, the oldest first: those whose labels were asked for, whether these came
    or not, or those with an outcome."""
    which = answers.c.requested if requested else outcomes.c.reported.is_not(None)
    return _rows(connection, replies.c.hash == hash, which, replies.c.created >= since)[::-1]


def _own(columns: Any, hash: str, owner: str | None) -> ColumnElement[bool]:
    same: ColumnElement[bool] = columns.hash == hash
    return same if owner is None else and_(same, columns.owner == owner)


def _rows(
    connection: Connection,
    *conditions: ColumnElement[bool],
    limit: int | None = None,
    order: ColumnElement[float] = replies.c.created,
) -> list[Stored]:
    """The newest answers for which all of this holds, with their outcomes."""
    outcome = and_(
        answers.c.owner == outcomes.c.owner, answers.c.id == outcomes.c.id, answers.c.item == outcomes.c.item
    )
    reply = and_(answers.c.owner == replies.c.owner, answers.c.id == replies.c.id)
    names = Stored.__dataclass_fields__.keys() - {"created", "reported", "correct", "truth", "requested"}
    query = (
        select(
            *(answers.c[name] for name in sorted(names)), answers.c.requested, replies.c.created,
            outcomes.c.reported, outcomes.c.correct, outcomes.c.truth,
        )
        .select_from(answers.join(replies, reply).outerjoin(outcomes, outcome))
        .where(*conditions)
        .order_by(order.desc(), answers.c.id.desc(), answers.c.item.desc())
        .limit(limit)
    )  # fmt: skip
    return [Stored(**row) for row in connection.execute(query).mappings()]
