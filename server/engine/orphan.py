"""The engine core must not outlive the server that started it."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that started it is gone, however it went: killed for its memory, a
    server leaves nobody who would stop an engine that holds memory and computes. The main process is left alone."""
    if multiprocessing.parent_process() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
