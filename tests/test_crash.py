"""kill -9 at random moments (tests/crash.py): 20 here, 200 by `make crash`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.long
def test_whatever_is_killed_leaves_the_old_or_the_new_state() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.crash"], env={**os.environ, "CRASHES": "20"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    rows = [line.split(" | ") for line in ended.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| fit", "| import", "| calibrate", "| serve"]
    assert sum(int(row[1]) for row in rows) >= 10, "most moments lie within the command"
