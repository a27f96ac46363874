"""Replies to store, and a PostgreSQL to store them in."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from server.store.values import Answer, Reply

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # where Debian has them
OWNER, OTHER = "a" * 64, "b" * 64


def answer(options: Sequence[Any] | None = (" no", " yes"), best: int | None = 1, **fields: Any) -> Answer:
    """An answer to a choice, or of no options a text."""
    if options is None:
        return Answer("text", "map", 1, "float32", **fields)
    p = tuple(1 / len(options) for _ in options)
    own = {"options": tuple(options), "probability": p, "best": best}
    return Answer("choice", "mixture", 8, "bfloat16", **{**own, **fields})


def reply(id: str, *answers: Answer, owner: str = OWNER, created: float | None = None, **fields: Any) -> Reply:
    own = dict(enumerate(answers or (answer(),)))
    return Reply(owner, id, time.time() if created is None else created, "gang", "gang", "hash", "base", own, **fields)


class Cluster:
    """A PostgreSQL server in a folder."""

    def __init__(self, folder: Path) -> None:
        from tests.server.running import free_port  # seconds, which not every program has

        self.folder, self.port = folder, free_port()
        self.url = f"postgresql://outcomes:secret@127.0.0.1:{self.port}"
        self.databases = 0
        password = folder / "password"
        password.write_text("secret")
        for path in (folder, password):
            path.chmod(0o777)  # a server does not run as root, so it is nobody who does
        self._run("initdb", "-U", "outcomes", "--pwfile", str(password), "-A", "scram-sha-256", "--no-sync")

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-w", "-m", "fast", "stop")

    def database(self) -> str:
        """The URL of a new one."""
        import psycopg

        self.databases += 1
        with psycopg.connect(f"{self.url}/postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE d{self.databases}".encode())
        return f"{self.url}/d{self.databases}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(PROGRAMS[-1] / program), "-D", str(self.folder / "data"), *arguments]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *command]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stdout + done.stderr


def available() -> bool:
    """Whether there is a PostgreSQL."""
    return bool(PROGRAMS) and shutil.which("setpriv") is not None


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A running PostgreSQL. The test is skipped where there is none."""
    if not available():
        pytest.skip("no PostgreSQL here: apt-get install --no-install-recommends postgresql")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own can be entered by this user alone
        running = Cluster(Path(folder))
        running.start()
        try:
            yield running
        finally:
            running.stop()
