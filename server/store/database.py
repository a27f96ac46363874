"""The database behind a URL: opened, locked while its schema is brought up to date, durable where it says done."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DisconnectionError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from posterior.errors import PosteriorError, first_line

SQLITE, POSTGRESQL = "sqlite", "postgresql"
FORMS = "sqlite:///FILE (sqlite:////FILE from the root) or postgresql://USER:PASSWORD@HOST/DATABASE"
CONNECT_SECONDS, STATEMENT_SECONDS = 5, 10
LOCK = 0x506F7374  # "Post": the advisory lock of PostgreSQL under which the schema changes
MIGRATIONS = Path(__file__).parent / "migrations"


def default_file() -> Path:
    """Where outcomes are kept unless a URL says otherwise: the user's folder for state. Unlike a cache, nothing makes
    them again. Raises PosteriorError."""
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    except RuntimeError:
        raise PosteriorError("this user has no home folder for outcomes; give --outcomes a URL") from None
    return state / "posterior-server" / "outcomes.db"


def read_url(given: str) -> URL:
    """The URL of a database; an empty one is that of the default file. Raises PosteriorError."""
    if not given:
        return URL.create(SQLITE, database=str(default_file()))
    try:
        url = make_url(given)
    except (ArgumentError, ValueError) as error:
        raise PosteriorError(f"this is no URL of a database; write it as {FORMS}") from error
    if url.drivername == SQLITE and url.database not in (None, "", ":memory:") and not url.query:
        return url
    if url.drivername in (POSTGRESQL, "postgres") and url.database:
        return url.set(drivername=f"{POSTGRESQL}+psycopg")
    raise PosteriorError(f"outcomes cannot be kept in {_named(url)}; write it as {FORMS}")


def existing(source: str) -> URL:
    """The URL of a database, or of a SQLite file that is there. Raises PosteriorError: no file is made here."""
    url = read_url(source if "://" in source else f"sqlite:///{source}")
    if url.drivername == SQLITE and not Path(url.database or "").is_file():
        raise PosteriorError(f"there is no file {url.database} of outcomes; name what `posterior serve --outcomes` has")
    return url


def connect(url: URL) -> Engine:
    """An engine for the database, whose schema is the newest. Raises PosteriorError."""
    try:
        return _upgraded(_sqlite(Path(url.database or "")) if url.drivername == SQLITE else _postgresql(url))
    except CommandError as error:
        raise PosteriorError(
            f"the database {_named(url)} was written by a later version of this server ({first_line(error)}); use "
            "that version, or another database"
        ) from error
    except (SQLAlchemyError, sqlite3.Error, OSError) as error:
        raise PosteriorError(f"the database {_named(url)} cannot be opened: {reason(error)}") from error


def _upgraded(engine: Engine) -> Engine:
    """The engine, after the migrations that were still to come: all or none. Another server that starts waits."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    try:
        with engine.begin() as connection:
            if connection.dialect.name == POSTGRESQL:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except Exception:
        engine.dispose()
        raise
    return engine


def _sqlite(file: Path) -> Engine:
    """An engine for a file, which is made for this user alone if it is not there. One that vanishes while the engine
    lives is not made again: an empty database must not take its place unseen."""
    file = file.absolute()
    file.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def opened() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(str(file))}?mode=rw", uri=True, timeout=CONNECT_SECONDS, check_same_thread=False,
            isolation_level=None,
        )  # fmt: skip
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    engine = create_engine(URL.create(SQLITE, database=str(file)), creator=opened, pool_size=1, max_overflow=0)

    @event.listens_for(engine, "connect")
    def note(_: Any, record: ConnectionPoolEntry) -> None:
        record.info["file"] = file.stat()

    @event.listens_for(engine, "checkout")
    def check(_: Any, record: ConnectionPoolEntry, __: Any) -> None:
        if not file.exists() or not os.path.samestat(file.stat(), record.info["file"]):
            raise DisconnectionError  # and the pool opens it again

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # Python would begin late, and leave DDL out

    return engine


def _postgresql(url: URL) -> Engine:
    """An engine for a server, which answers in time or fails, and whose commits are on its disk."""
    arguments = {
        "connect_timeout": str(CONNECT_SECONDS),
        "tcp_user_timeout": str(1000 * STATEMENT_SECONDS),
        "options": f"-c statement_timeout={1000 * STATEMENT_SECONDS} -c synchronous_commit=on",
    }
    given = {name: value for name, value in arguments.items() if name not in url.query}
    try:
        return create_engine(url, connect_args=given, pool_size=1, max_overflow=0, pool_pre_ping=True)
    except ImportError as error:
        raise PosteriorError(
            "PostgreSQL needs psycopg; install it with `pip install 'posterior-server[postgres]'`"
        ) from error


def _named(url: URL) -> str:
    """The URL without its password."""
    return url.render_as_string(hide_password=True)


def reason(error: Exception) -> str:
    """What the database said, in one line, without the statement and its values."""
    return first_line(getattr(error, "orig", None) or error)
