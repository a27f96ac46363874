"""Answers and outcomes in a SQLite file and in a PostgreSQL server."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import asdict, fields, replace
from typing import Any, cast

import pytest
from sqlalchemy import Table, func, select

from server.errors import Unavailable
from server.store import store as stores
from server.store import tables, work
from server.store.store import DAY, Store
from server.store.values import Answer, Report, Reporter, Result
from tests.server.store.conftest import Opened
from tests.server.store.made import OTHER, OWNER, answer, reply


def report(store: Store, *reports: Report, owner: str = OWNER, admin: bool = False) -> list[Result]:
    return asyncio.run(store.report(Reporter(owner, admin), reports))


def forget(store: Store, id: str, owner: str = OWNER, admin: bool = False) -> bool:
    return asyncio.run(store.forget(Reporter(owner, admin), id))


def statuses(results: list[Result]) -> list[str]:
    return [result.status for result in results]


def counted(store: Store) -> list[int]:
    """How many replies, answers and outcomes there are."""
    report(store, Report("settled"))  # what waits is written before it
    with store._engine.connect() as connection:
        each: tuple[Table, ...] = (tables.replies, tables.answers, tables.outcomes)
        return [connection.execute(select(func.count()).select_from(table)).scalar_one() for table in each]


def dropped(store: Store) -> float:
    return store._metrics.registry.get_sample_value("posterior_answers_dropped_total") or 0.0


@pytest.mark.parametrize(
    ("options", "reported", "correct", "truth"),
    [
        ((" no", " yes"), {"answer": " yes"}, True, 1),
        ((" no", " yes"), {"answer": " no"}, False, 0),
        ((" no", " yes"), {"correct": True}, True, 1),
        ((" no", " yes"), {"correct": False}, False, 0),  # the other one
        (("a", "b", "c"), {"correct": False}, False, None),
        (("true", True, "1"), {"answer": True}, True, 1),
        (("true", True, "1"), {"answer": "true"}, False, 0),
        ((0, 1, 2), {"answer": 1}, True, 1),
        ((True, False), {"answer": False}, True, 1),
        (None, {"correct": False}, False, None),
    ],
)
def test_an_outcome_says_which_option_was_true(
    store: Store, options: Any, reported: dict[str, Any], correct: bool, truth: int | None
) -> None:
    store.keep(reply("r", answer(options)))
    (result,) = report(store, Report("r", **reported))
    assert (result.status, result.correct, result.posterior) == ("stored", correct, "gang")
    with store._engine.connect() as connection:
        (row,) = connection.execute(select(tables.outcomes)).all()
    assert (row.owner, row.id, row.item, row.truth, row.correct) == (OWNER, "r", 0, truth, correct)
    assert abs(row.reported - time.time()) < 60


@pytest.mark.parametrize(
    ("options", "reported", "message"),
    [
        (("a", "b", "c"), "d", "'d' is none of this question's options: 'a', 'b', 'c'"),
        (("a", "b", "c"), True, "True is none of this question's options: 'a', 'b', 'c'"),
        ((True, False), 1, "1 is none of this question's options: True, False"),
        (range(12), 12, "12 is none of this question's options: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"),
        (None, "d", "this answer is a text, which has no options; report 'correct'"),
    ],
)
def test_what_was_no_option_cannot_be_true(store: Store, options: Any, reported: Any, message: str) -> None:
    store.keep(reply("r", answer(options)))
    (result,) = report(store, Report("r", answer=reported))
    assert (result.status, result.correct, result.message) == ("invalid", None, message)
    assert counted(store)[2] == 0


def test_a_second_outcome_is_the_same_or_a_conflict(store: Store) -> None:
    store.keep(reply("r", answer(), answer(("a", "b", "c"))))
    assert statuses(report(store, Report("r", answer=" yes"))) == ["stored"]
    again = [Report("r", answer=" yes"), Report("r", correct=True), Report("r", answer=" no"), Report("r", 1, "a")]
    results = report(store, *again, Report("r", 1, correct=False), Report("r", 1, "b"), Report("r", 1, "a"))
    assert statuses(results) == ["known", "known", "conflict", "stored", "conflict", "conflict", "known"]
    assert [result.correct for result in results] == [True, True, True, False, False, False, False]
    value = store._metrics.registry.get_sample_value
    labels = [{"posterior": "gang", "status": status} for status in ("stored", "known", "conflict")]
    assert [value("posterior_outcomes_total", each) for each in labels] == [2, 3, 3]


def test_another_key_s_answers_are_unknown(store: Store) -> None:
    store.keep(reply("r"))
    others = report(store, Report("r", correct=True), owner=OTHER)
    never = report(store, Report("never", correct=True), owner=OTHER)
    assert others[0].message == never[0].message and statuses(others + never) == ["unknown"] * 2
    assert not forget(store, "r", OTHER) and statuses(report(store, Report("r", 1, correct=True))) == ["unknown"]
    store.keep(reply("r", owner=OTHER))
    assert forget(store, "r", OTHER) and counted(store) == [1, 1, 0]


def test_an_admin_names_the_answers_of_every_key(store: Store) -> None:
    for id, owner in (("one", OWNER), ("both", OWNER), ("both", OTHER), ("mine", OWNER), ("mine", "c" * 64)):
        store.keep(reply(id, owner=owner))
    boss = {"owner": "c" * 64, "admin": True}
    own = report(
        store, Report("one", correct=True), Report("both", correct=True), Report("mine", correct=False), **boss
    )
    assert statuses(own) == ["stored", "unknown", "stored"]
    assert own[1].message == "several keys have a reply of this id, and only they can name their own"
    later = report(store, Report("one", correct=True), Report("both", correct=True), Report("mine", correct=True))
    assert statuses(later) == ["known", "stored", "stored"], "an admin's own reply comes before another's"
    assert not forget(store, "both", **boss) and not forget(store, "never", **boss)
    assert forget(store, "mine", **boss) and forget(store, "mine", **boss) and not forget(store, "mine", **boss)
    assert counted(store) == [3, 3, 2]


def test_a_deleted_reply_takes_everything_with_it(store: Store) -> None:
    store.keep(reply("r", answer(), answer()))
    store.keep(reply("other"))
    report(store, Report("r", 1, correct=True), Report("other", correct=True))
    assert counted(store) == [2, 3, 2]
    assert forget(store, "r") and not forget(store, "r")
    assert counted(store) == [1, 1, 1]


def test_answers_wait_for_so_many_days(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = opened(), time.time()
    for id, age in (("old", 3), ("older", 4), ("oldest", 5), ("old and known", 3), ("new", 1)):
        store.keep(reply(id, created=now - age * DAY))
    report(store, Report("old and known", correct=True))
    assert counted(store) == [5, 5, 1]
    store.close()
    monkeypatch.setattr(work, "EXPIRED_TOGETHER", 2)
    later, deadline = opened(days=2), time.monotonic() + 10
    while counted(later) != [2, 2, 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    results = report(later, Report("old", correct=True), Report("old and known", correct=True), Report("new", 0, " no"))
    assert statuses(results) == ["unknown", "known", "stored"] and counted(later) == [2, 2, 2]


def test_answers_whose_labels_were_asked_for_wait_on(opened: Opened) -> None:
    store, old = opened(requests=True), time.time() - 9 * DAY
    asked = replace(answer(), requested=True)
    store.keep(reply("asked", answer(), asked, created=old, request={"said": "private"}))
    store.keep(reply("known", asked, created=old, request={"said": "kept"}))
    store.keep(reply("old", created=old))
    report(store, Report("known", correct=True))
    assert counted(store) == [3, 4, 1]
    store.close()
    later, deadline = opened(days=2), time.monotonic() + 10
    while counted(later) != [2, 3, 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    with later._engine.connect() as connection:
        found = dict(connection.execute(select(tables.replies.c.id, tables.replies.c.request)).all())
    assert found == {"asked": None, "known": {"said": "kept"}}
    assert statuses(report(later, Report("asked", 1, correct=False))) == ["stored"]


def test_chance_alone_asks_for_labels(opened: Opened) -> None:
    never, always = opened(), opened(share=1.0)
    assert not any(never.asks() for _ in range(100)) and all(always.asks() for _ in range(100))
    store = opened(share=0.25)
    asked = sum(store.asks() for _ in range(10_000))
    assert abs(asked - 2500) < 5 * math.sqrt(10_000 * 0.25 * 0.75)


def test_every_field_comes_back(opened: Opened) -> None:
    store, made = opened(requests=True), time.time()
    full = Answer(
        "score", "mixture", 8, "bfloat16", {"base": "b", "particles": 8, "question": "score"}, (0, 1), (0.25, 0.75), 1,
        0.7, True, 0.05, "ambiguous", 0.01, 0.5, 0.1, (0, 1), 0.9, {"logprob": -1.5}, True,
    )  # fmt: skip
    assert None not in asdict(full).values()
    store.keep(reply("r", full, answer(None), created=made, request={"prompts": ["said \0 \u20ac"]}))
    counted(store)
    with store._engine.connect() as connection:
        (own,) = connection.execute(select(tables.replies)).mappings().all()
        rows = connection.execute(select(tables.answers).order_by(tables.answers.c.item)).mappings().all()
        nothing = connection.execute(select(tables.answers.c.item).where(tables.answers.c.options.is_(None))).all()
    assert dict(own) == {
        "owner": OWNER, "id": "r", "created": made, "model": "gang", "posterior": "gang", "hash": "hash",
        "base": "base", "request": {"prompts": ["said \0 \u20ac"]},
    }  # fmt: skip
    for row, stored in zip(rows, (full, answer(None)), strict=True):
        found = {field.name: row[field.name] for field in fields(Answer)}
        assert found == {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(stored).items()}
    assert nothing == [(1,)]  # NULL, and not the text "null"


def test_of_two_replies_with_one_id_the_first_stays(store: Store) -> None:
    first = reply("r", answer(("a", "b")), created=1.0)
    store.keep(first)
    store.keep(reply("r", answer(("c", "d")), answer(("e", "f")), created=2.0))
    store.keep(replace(first, answers={1: answer(("g", "h"))}))  # the next text of the first
    assert statuses(report(store, Report("r", 0, "a"), Report("r", 1, "g"))) == ["stored", "stored"]


@pytest.mark.parametrize("id", ["r" * 257, "r\0", "r\n"])
def test_an_id_that_no_column_can_hold(store: Store, id: str) -> None:
    store.keep(reply(id, answer(), answer()))
    assert dropped(store) == 2
    assert statuses(report(store, Report(id, correct=True))) == ["unknown"] and not forget(store, id)


def test_what_is_too_much_is_dropped_and_counted(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stores, "MAX_WAITING", 80)
    with store._changed:  # the thread does not get to write
        for number in range(4):
            store.keep(reply(f"r{number}"))
    monkeypatch.undo()
    results = report(store, *(Report(f"r{number}", correct=True) for number in range(4)))
    assert statuses(results) == ["stored", "stored", "unknown", "unknown"]
    assert dropped(store) == 2 and [record.levelname for record in caplog.records] == ["WARNING"]


def test_one_that_is_refused_does_not_fail_the_others(store: Store) -> None:
    with store._changed:  # the thread writes all three together
        store.keep(reply("good"))
        store.keep(reply("bad", replace(answer(), kind=cast(Any, None))))
        store.keep(reply("also good"))
    results = report(store, *(Report(id, correct=True) for id in ("good", "bad", "also good")))
    assert statuses(results) == ["stored", "unknown", "stored"] and dropped(store) == 1


def test_two_servers_share_a_database(opened: Opened) -> None:
    first, second = opened(), opened()
    first.keep(reply("r"))
    assert counted(first) == [1, 1, 0]
    assert statuses(report(second, Report("r", correct=True))) == ["stored"]
    assert statuses(report(first, Report("r", correct=False))) == ["conflict"]


def test_what_waits_is_written_before_the_end(opened: Opened) -> None:
    store = opened()
    for number in range(200):
        store.keep(reply(f"r{number}"))
    store.close()
    assert counted(opened()) == [200, 200, 0]
    store.keep(reply("late"))
    assert dropped(store) == 1
    with pytest.raises(Unavailable, match="stopping"):
        report(store, Report("r0", correct=True))


def test_reports_that_are_too_many_to_wait_may_come_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_WAITING", 8)
    with pytest.raises(Unavailable, match="too slow"):
        report(store, Report("r", correct=True), Report("r", correct=True))
    assert statuses(report(store, Report("r", correct=True))) == ["unknown"]
