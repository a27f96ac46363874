"""What is done in the database, each in a transaction of its caller."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, delete, exists, insert, select, tuple_, update

from posterior.data.decisions import Value
from server.store.tables import ID, answers, outcomes, replies
from server.store.values import Reply, Report, Reporter, Result

SHOWN = 10  # options that a message lists
EXPIRED_TOGETHER = 1000  # replies: others must not wait for long


def storable(id: str) -> bool:
    """Whether a reply of this id can be stored; PostgreSQL has no character 0, and its keys have a length. Clients
    have a hand in some ids."""
    return len(id) <= ID and id.isprintable()


class _Truth(NamedTuple):
    """Which option was true, if that is known, and whether the answer was right."""

    option: int | None
    correct: bool


class _Known(NamedTuple):
    """What is stored of an answer."""

    owner: str
    posterior: str | None
    hash: str | None
    requested: bool
    options: Sequence[Value] | None
    best: int | None
    outcome: _Truth | None


def keep(connection: Connection, reply: Reply) -> None:
    """Stores a reply with its answers, or more answers of it. Of two replies to one key with one id, which only a
    client can bring about, the first stays: they differ in their time."""
    named = {"owner": reply.owner, "id": reply.id}
    same = select(replies.c.created).where(replies.c.owner == reply.owner, replies.c.id == reply.id)
    created = connection.execute(same).scalar()
    if created is None:
        own = {name: getattr(reply, name) for name in ("created", "model", "posterior", "hash", "base", "request")}
        connection.execute(insert(replies), {**named, **own})
    elif created != reply.created:
        return
    rows = [{**named, "item": item, **asdict(answer)} for item, answer in reply.answers.items()]
    connection.execute(insert(answers), rows)


def report(connection: Connection, reporter: Reporter, reports: Sequence[Report]) -> list[Result]:
    """Stores the outcomes that can be, each by itself, and says in order what became of each."""
    owners = _owners(connection, reporter, {each.id for each in reports if storable(each.id)})
    known = _known(connection, owners, reports)
    new: dict[tuple[str, int], dict[str, Any]] = {}
    results = []
    for each in reports:
        place = (each.id, each.item)
        result, truth = _judged(each, known.get(place), several=owners.get(each.id, "") is None)
        results.append(result)
        if result.status == "stored" and truth is not None:
            answer = known[place] = known[place]._replace(outcome=truth)
            new[place] = {
                "owner": answer.owner, "id": each.id, "item": each.item, "reported": time.time(), "truth": truth.option,
                "correct": truth.correct, "requested": answer.requested, "hash": answer.hash,
            }  # fmt: skip
    if new:
        connection.execute(insert(outcomes), list(new.values()))
    return results


def forget(connection: Connection, reporter: Reporter, id: str) -> bool:
    """Deletes a reply with its answers and their outcomes; whether there was one."""
    if not storable(id):
        return False
    owner = _owners(connection, reporter, {id})[id]
    done = connection.execute(delete(replies).where(replies.c.owner == owner, replies.c.id == id))
    return done.rowcount > 0


def expire(connection: Connection, before: float) -> int:
    """Deletes EXPIRED_TOGETHER of the replies that are older and of whose answers nobody has said what was true, or as
    many as there are; how many they were.

    Replies with an answer whose label was asked for stay, without the request's body: else nobody could tell how many
    of these labels never came.
    """
    named = exists().where(outcomes.c.owner == replies.c.owner, outcomes.c.id == replies.c.id)
    asked = exists().where(answers.c.owner == replies.c.owner, answers.c.id == replies.c.id, answers.c.requested)
    over = and_(replies.c.created < before, ~named)
    connection.execute(update(replies).where(over, replies.c.request.is_not(None), asked).values(request=None))
    old = select(replies.c.owner, replies.c.id).where(over, ~asked).limit(EXPIRED_TOGETHER)
    return connection.execute(delete(replies).where(tuple_(replies.c.owner, replies.c.id).in_(old))).rowcount


def _owners(connection: Connection, reporter: Reporter, ids: set[str]) -> dict[str, str | None]:
    """Whose reply is meant by each id: the reporter's own; of an admin who has none, that of the only key that has one.
    None where several have."""
    own: dict[str, str | None] = dict.fromkeys(ids, reporter.owner)
    if not reporter.admin:
        return own
    found: dict[str, set[str]] = {}
    for id, owner in connection.execute(select(replies.c.id, replies.c.owner).where(replies.c.id.in_(ids))):
        found.setdefault(id, set()).add(owner)
    others = {id: owners for id, owners in found.items() if reporter.owner not in owners}
    return own | {id: owners.pop() if len(owners) == 1 else None for id, owners in others.items()}


def _known(
    connection: Connection, owners: Mapping[str, str | None], reports: Sequence[Report]
) -> dict[tuple[str, int], _Known]:
    """The answers that are reported of, as far as they are there, by id and item."""
    places = list({(owners[each.id], each.id, each.item) for each in reports if owners.get(each.id) is not None})
    reply = and_(answers.c.owner == replies.c.owner, answers.c.id == replies.c.id)
    outcome = and_(
        answers.c.owner == outcomes.c.owner, answers.c.id == outcomes.c.id, answers.c.item == outcomes.c.item
    )
    found = connection.execute(
        select(
            answers.c.owner, answers.c.id, answers.c.item, answers.c.options, answers.c.best, answers.c.requested,
            replies.c.posterior, replies.c.hash, outcomes.c.truth, outcomes.c.correct,
        )
        .select_from(answers.join(replies, reply).outerjoin(outcomes, outcome))
        .where(tuple_(answers.c.owner, answers.c.id, answers.c.item).in_(places))
    )  # fmt: skip
    return {
        (row.id, row.item): _Known(
            row.owner, row.posterior, row.hash, row.requested, row.options, row.best,
            None if row.correct is None else _Truth(row.truth, row.correct),
        )
        for row in found
    }  # fmt: skip


def _judged(report: Report, known: _Known | None, *, several: bool) -> tuple[Result, _Truth | None]:
    """What becomes of a report, and what it says. several: keys have a reply of its id, and none is the reporter's."""
    if known is None:
        message = "no such answer is kept: its id or index is another, it was deleted, or its time is over"
        if several:
            message = "several keys have a reply of this id, and only they can name their own"
        return Result(report, "unknown", message=message), None
    truth = _truth(report, known)
    if isinstance(truth, str):
        return Result(report, "invalid", message=truth, posterior=known.posterior), None
    if known.outcome is None:
        return Result(report, "stored", truth.correct, posterior=known.posterior), truth
    if known.outcome == truth:
        return Result(report, "known", truth.correct, posterior=known.posterior), truth
    message = "another outcome of this answer is stored; delete the reply's to take it back"
    return Result(report, "conflict", known.outcome.correct, message, known.posterior), None


def _truth(report: Report, known: _Known) -> _Truth | str:
    """What a report says, or why it cannot be: of two options the one that was not right names the other."""
    options, best = known.options, known.best
    if options is None or best is None:
        if report.correct is None:
            return "this answer is a text, which has no options; report 'correct'"
        return _Truth(None, report.correct)
    if report.correct is None:
        for number, option in enumerate(options):
            if type(option) is type(report.answer) and option == report.answer:  # True == 1 to Python
                return _Truth(number, number == best)
        shown = ", ".join(repr(option) for option in options[:SHOWN])
        more = f" and {len(options) - SHOWN} more" if len(options) > SHOWN else ""
        return f"{report.answer!r} is none of this question's options: {shown}{more}"
    if report.correct:
        return _Truth(best, True)
    return _Truth(1 - best if len(options) == 2 else None, False)
