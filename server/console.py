"""The server's own lines on the terminal, and a place for everything else that is written there."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from posterior.errors import PosteriorError
from server import logs

_terminal: TextIO | None = None  # where our lines go while stderr itself goes to a log


def say(line: str) -> None:
    """Write one of our lines, wherever the rest goes."""
    print(logs.line(line), file=_terminal or sys.stderr, flush=True)


@contextlib.contextmanager
def quiet(log: Path, verbose: bool) -> Iterator[None]:
    """On a terminal, unless `verbose`: what this process and those it starts write goes to `log`, but for `say`.

    vLLM, torch and OpenMP write some thirty lines at a start. The log of the run before is kept beside it, as *.1.
    Raises PosteriorError if the log cannot be written; one that is raised within names the log.
    """
    if verbose or not sys.stderr.isatty():
        yield
        return
    with _redirected(log):
        say(f"what vLLM and torch say goes to {log} (--verbose shows it here)")
        try:
            yield
        except PosteriorError as error:
            raise PosteriorError(f"{error} (log: {log})") from error


@contextlib.contextmanager
def _redirected(log: Path) -> Iterator[None]:
    global _terminal
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_opened(log))
        sys.stdout.flush()
        sys.stderr.flush()
        for number in (1, 2):
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
        _terminal = stack.enter_context(os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace"))
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            _terminal = None


def _opened(log: Path) -> contextlib.AbstractContextManager[TextIO]:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            log.replace(log.with_name(f"{log.name}.1"))
        return log.open("w", encoding="utf-8")
    except OSError as error:
        raise PosteriorError(
            f"cannot write the log {log}: {error.strerror}; name a folder that can be written in POSTERIOR_CACHE, or "
            "give --verbose"
        ) from error
