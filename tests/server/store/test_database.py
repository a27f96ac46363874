"""Databases that are old, new, gone, or none; and a process that is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from posterior.errors import PosteriorError
from server.errors import Unavailable
from server.metrics import Metrics
from server.store import database
from server.store.store import Store
from server.store.tables import VERSION_TABLE, metadata
from server.store.values import Report
from tests.server.store.made import OWNER, Cluster, available, reply
from tests.server.store.test_store import counted, dropped, report, statuses

SCHEMAS = sorted(Path(__file__).parent.glob("schema*.sql"))  # of earlier versions, with two answers and an outcome
WRITER = f"""
import asyncio, itertools, sys
from server.metrics import Metrics
from server.store.store import Store
from server.store.values import Report, Reporter
from tests.server.store.made import reply
stores = [Store(url, Metrics()) for url in sys.argv[1:]]
for number, store in zip(itertools.count(), itertools.cycle(stores)):
    store.keep(reply(str(number)))
    (result,) = asyncio.run(store.report(Reporter("{OWNER}"), [Report(str(number), correct=True)]))
    print(number, result.status, flush=True)
"""


def test_the_migrations_make_the_tables(url: str) -> None:
    engine = database.connect(database.read_url(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_there_is_a_database_of_every_earlier_schema() -> None:
    versions = (Path(database.__file__).parent / "migrations/versions").glob("v*.py")
    assert len(SCHEMAS) == len(list(versions)) - 1


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda path: path.stem)
def test_a_database_of_an_earlier_schema_is_brought_up_to_date(url: str, schema: Path) -> None:
    parsed, script = database.read_url(url), schema.read_text()
    if parsed.drivername == "sqlite":
        file = Path(parsed.database or "")
        file.parent.mkdir()
        with sqlite3.connect(file) as old:
            old.executescript(script)
        old.close()
    else:
        import psycopg

        with psycopg.connect(url) as connection:
            connection.execute(script.encode())
    store = Store(url, Metrics(), days=36500, requests=True)
    assert counted(store) == [1, 2, 1]
    assert statuses(report(store, Report("pred-1", 0, " yes"), Report("pred-1", 1, " no"))) == ["known", "stored"]
    store.keep(reply("new", request={"model": "gang"}))
    assert counted(store) == [2, 3, 2]
    with store._engine.connect() as found:
        rows = found.execute(text("SELECT id, request IS NULL FROM posterior_replies ORDER BY created")).all()
        outcomes = found.execute(text("SELECT hash, requested FROM posterior_outcomes")).all()
    assert [(id, bool(nothing)) for id, nothing in rows] == [("pred-1", True), ("new", False)]
    assert [(hash, bool(requested)) for hash, requested in outcomes] == [("hash", False)] * 2
    store.close()
    Store(url, Metrics()).close()  # there is nothing left to do


def test_a_database_of_a_later_version_is_left_alone(url: str) -> None:
    engine = database.connect(database.read_url(url))
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '99'"))
    engine.dispose()
    with pytest.raises(PosteriorError, match="later version of this server.*'99'"):
        database.connect(database.read_url(url))


@pytest.mark.parametrize(
    "given",
    [
        "outcomes.db",
        "sqlite://",
        "sqlite:///:memory:",
        "mysql://u:secret@h/d",
        "postgresql://u:secret@h",
        "://",
        "x\0y",
    ],
)
def test_urls_that_are_none(given: str) -> None:
    with pytest.raises(PosteriorError, match="write it as sqlite:///FILE") as error:
        database.read_url(given)
    assert "secret" not in str(error.value)


def test_the_default_is_a_file_of_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    store = Store("", Metrics())
    store.keep(reply("r"))
    counted(store)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "posterior-server").iterdir()}
    assert modes.keys() >= {"outcomes.db", "outcomes.db-wal"} and set(modes.values()) == {0o600}
    assert store.name == f"sqlite:///{tmp_path}/posterior-server/outcomes.db"
    with store._engine.connect() as connection:
        pragmas = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")]
    store.close()
    assert pragmas == ["wal", 2]  # 2 is FULL


def test_what_is_no_database_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n' * 100)
    for path, why in ((file, "file is not a database"), (tmp_path, "Is a directory")):
        with pytest.raises(PosteriorError, match=f"the database sqlite:///{path} cannot be opened: .*{why}"):
            Store(f"sqlite:///{path}", Metrics())


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(PosteriorError, match="cannot be opened: .*refused") as error:
        Store("postgresql://u:secret@127.0.0.1:9/d", Metrics())
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    folder, away = tmp_path / "there", tmp_path / "away"
    store = Store(f"sqlite:///{folder}/outcomes.db", Metrics())
    store.keep(reply("before"))
    assert counted(store) == [1, 1, 0]
    folder.rename(away)
    store.keep(reply("meanwhile"))
    with pytest.raises(Unavailable, match="cannot be reached now"):
        report(store, Report("before", correct=True))
    assert dropped(store) == 1 and not folder.exists()
    away.rename(folder)
    store.keep(reply("after"))
    results = report(store, *(Report(id, correct=True) for id in ("before", "meanwhile", "after")))
    assert statuses(results) == ["stored", "unknown", "stored"]
    store.close()


def test_a_server_that_stops_and_comes_back(postgresql: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(postgresql.database(), Metrics())
    store.keep(reply("before"))
    assert counted(store) == [1, 1, 0]
    postgresql.stop()
    try:
        store.keep(reply("meanwhile"))
        with pytest.raises(Unavailable):
            report(store, Report("before", correct=True))
    finally:
        postgresql.start()
    assert dropped(store) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "secret" not in caplog.text
    store.keep(reply("after"))
    results = report(store, *(Report(id, correct=True) for id in ("before", "meanwhile", "after")))
    assert statuses(results) == ["stored", "unknown", "stored"]
    store.close()


def test_a_file_that_another_process_holds_for_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "CONNECT_SECONDS", 0.1)
    store = Store(f"sqlite:///{tmp_path}/outcomes.db", Metrics())
    store.keep(reply("r"))
    assert counted(store) == [1, 1, 0]
    other = sqlite3.connect(tmp_path / "outcomes.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable):
        report(store, Report("r", correct=True))
    other.close()
    assert statuses(report(store, Report("r", correct=True))) == ["stored"]
    store.close()


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    urls = [f"sqlite:///{tmp_path}/outcomes.db"]
    if available():
        urls.append(request.getfixturevalue("postgresql").database())
    process = subprocess.Popen([sys.executable, "-c", WRITER, *urls], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(40)]
    time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    said += [line for line in process.stdout.readlines() if line.endswith("\n")]
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert [line.split() for line in said] == [[str(number), "stored"] for number in range(len(said))]
    for turn, url in enumerate(urls):
        store = Store(url, Metrics())
        acknowledged = [Report(str(number), correct=True) for number in range(turn, len(said), len(urls))]
        assert statuses(report(store, *acknowledged)) == ["known"] * len(acknowledged)
        store.close()
