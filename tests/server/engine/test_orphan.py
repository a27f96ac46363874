from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

from server.engine.orphan import die_with_parent


def _child(pipe: Connection) -> None:
    die_with_parent()
    pipe.send(os.getpid())
    time.sleep(600)


def _parent(pipe: Connection) -> None:
    multiprocessing.get_context("spawn").Process(target=_child, args=(pipe,)).start()
    time.sleep(600)


def test_a_killed_parent_takes_its_child_along() -> None:
    ours, theirs = multiprocessing.Pipe()
    parent = multiprocessing.get_context("spawn").Process(target=_parent, args=(theirs,))
    parent.start()
    assert ours.poll(60)
    child = ours.recv()
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join(10)
    deadline = time.monotonic() + 10
    while _lives(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _lives(child)


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
