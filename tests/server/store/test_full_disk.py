"""A disk that is full, as SQLite meets it: the file may not grow. PostgreSQL's clusters have no such limit to set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from server.errors import Unavailable
from server.metrics import Metrics
from server.store.store import Store
from server.store.values import Report
from tests.server.store.made import reply
from tests.server.store.test_store import counted, dropped, report, statuses

PAGES = 2**30


def limited(pages: list[int]) -> Any:
    """Every connection that is taken lets the file have the last of these numbers of pages, or what it has."""

    def limit(connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={pages[-1]}")

    return limit


def test_what_was_acknowledged_stays_and_the_rest_is_counted(tmp_path: Path) -> None:
    pages = [PAGES]
    limit = limited(pages)
    event.listen(Engine, "checkout", limit)
    try:
        store = Store(f"sqlite:///{tmp_path}/outcomes.db", Metrics())
        store.keep(reply("before"))
        assert counted(store) == [1, 1, 0]
        pages.append(1)
        lost = [f"meanwhile {number}" for number in range(300)]  # more than the last page holds
        for id in lost:
            store.keep(reply(id))
        with pytest.raises(Unavailable, match="cannot be reached now"):
            counted(store)
        assert dropped(store) > 0
        pages.append(PAGES)
        store.keep(reply("after"))
        results = report(store, Report("before", correct=True), Report("after", correct=False))
        assert statuses(results) == ["stored", "stored"]
        store.close()
    finally:
        event.remove(Engine, "checkout", limit)
