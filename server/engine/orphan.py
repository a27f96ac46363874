"""The engine core belongs to the server that started it: it must not outlive it, and logs as it does."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal

from server import logs

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def belong_to_the_server() -> None:
    """Let the kernel kill this process when the one that started it is gone, however it went: killed for its memory, a
    server leaves nobody who would stop an engine that holds memory and computes. Its log has the
    server's form. The main process is left alone."""
    if multiprocessing.parent_process() is not None:
        logs.start()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
