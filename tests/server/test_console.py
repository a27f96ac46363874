"""What a terminal shows of a start, and where the rest goes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, pathlib, subprocess, sys, warnings
from posterior.errors import PosteriorError
from server.console import quiet, say

verbose, fails = "verbose" in sys.argv, "fails" in sys.argv
try:
    with quiet(pathlib.Path(sys.argv[1]), verbose):
        say("ours")
        print("noise of Python"), warnings.warn("noise of a warning")
        os.write(2, b"noise of C\\n")
        subprocess.run([sys.executable, "-c", "print('noise of a child')"])
        if fails:
            raise PosteriorError("it failed")
    print("after")
except PosteriorError as error:
    print(f"posterior: {error}", file=sys.stderr)
"""


def run(folder: Path, *words: str, terminal: bool = True) -> tuple[str, str]:
    """What the program shows, and its log."""
    log = folder / "logs" / "a.log"
    main, side = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(log), *words], stdout=side, stderr=side)
    os.close(side)
    shown = b""
    try:
        while part := os.read(main, 65536):
            shown += part
    except OSError:  # a terminal that nobody writes to any more
        pass
    os.close(main)
    assert process.wait(30) == 0
    return shown.decode().replace("\r\n", "\n"), log.read_text() if log.exists() else ""


def test_a_terminal_shows_our_lines_and_names_the_log_of_the_others(tmp_path: Path) -> None:
    shown, log = run(tmp_path)
    assert "noise" not in shown and shown.endswith("posterior: ours\nafter\n")
    assert str(tmp_path / "logs" / "a.log") in shown.splitlines()[0]
    assert all(f"noise of {who}" in log for who in ("Python", "a warning", "C", "a child")) and "ours" not in log
    run(tmp_path)
    assert (tmp_path / "logs" / "a.log.1").read_text() == log, "the log of the run before is kept"


def test_an_error_is_shown_and_names_the_log(tmp_path: Path) -> None:
    shown, _ = run(tmp_path, "fails")
    assert shown.splitlines()[-1] == f"posterior: it failed (log: {tmp_path}/logs/a.log)"


def test_everything_is_shown_on_request_and_where_no_person_looks(tmp_path: Path) -> None:
    for words, terminal in ((("verbose",), True), ((), False)):
        shown, log = run(tmp_path, *words, terminal=terminal)
        assert log == "" and shown.count("noise of") == 4 and "posterior: ours" in shown


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    shown, _ = run(tmp_path)
    (line,) = shown.splitlines()
    assert line.startswith("posterior: cannot write the log") and "POSTERIOR_CACHE" in line
