"""What every worker's process does first. Without torch, so that it takes no time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from typing import Any

THREADS = 2  # of torch, on the CPU


def belong_to_the_server() -> None:
    """End when the server does, and not before it says so."""
    for number in (signal.SIGINT, signal.SIGTERM):  # both may reach the whole group; the server decides
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: Any) -> None:
    """End with the server, even if it was killed: an orphan would hold its models in memory for ever."""
    parent.join()
    os._exit(1)


def threads() -> int:
    """How many threads torch may use."""
    return min(THREADS, os.cpu_count() or 1)
