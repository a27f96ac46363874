"""Child processes that are killed: after the n-th step of what they write, or at any moment."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posterior.files import atomic, tensors
from posterior.storage.record import file_hash

STEPS: tuple[tuple[Any, str], ...] = (  # after any of them a process may be gone
    *((os, name) for name in ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "chmod", "utime")),
    (io, "open"),  # the file is empty then
    (atomic, "exchange"),
    (tensors.safetensors, "save_file"),
)


def killed_after(steps: int, work: Callable[[], object]) -> bool:
    """Do `work` in a child that is killed after so many steps; False if it was done before. Raises if it failed."""
    return _outcome(_forked(work, steps))


def killed_at(seconds: float, work: Callable[[], object]) -> bool:
    """Do `work` in a child that is killed after so many seconds; False if it was done before. Raises if it failed."""
    child = _forked(work)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return _outcome(child)


def together(count: int, work: Callable[[], object]) -> None:
    """Do the same in some children at once. Raises if one failed."""
    for child in [_forked(work) for _ in range(count)]:
        _outcome(child)


def snapshot(*roots: Path) -> dict[str, str]:
    """The content of every file below the roots."""
    return {str(path): file_hash(path) for root in roots for path in sorted(root.rglob("*")) if path.is_file()}


def leftovers(root: Path) -> list[str]:
    """What writers have left below `root`."""
    kinds = tuple(f".{kind}" for kind in (atomic.LOCK, atomic.PART, atomic.WORK, "checkpoint"))
    return sorted(str(path) for path in root.rglob(".*") if path.suffix in kinds)


def _forked(work: Callable[[], object], steps: int | None = None) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if steps is not None:
            _count(steps)
        work()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _outcome(child: int) -> bool:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError("the child failed; its own words are above")
    return status != 0


def _count(steps: int) -> None:
    left = [steps]

    def counted(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for module, name in STEPS:
        setattr(module, name, counted(getattr(module, name)))
