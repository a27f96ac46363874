"""SIGHUP reads the file of the keys again."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from pathlib import Path

import pytest

from server.access.keys import Keys
from server.main import follow


def write(path: Path, key: str) -> None:
    path.write_text(f'[keys.someone]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n')


@pytest.mark.asyncio
async def test_a_hangup_reads_the_keys_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.toml"
    write(file, "old")
    keys = Keys(None, file)
    follow(keys)
    write(file, "new")
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.05)
    assert keys.find(b"old") is not None, "the loop is busy"
    await asyncio.sleep(0.05)
    assert keys.find(b"old") is None and keys.find(b"new") is not None
    file.write_text("[keys.someone]\n")
    os.kill(os.getpid(), signal.SIGHUP)
    await asyncio.sleep(0.05)
    assert keys.find(b"new") is not None
    first, second = capsys.readouterr().err.splitlines()
    assert first == "posterior: the keys were read again; there are 1"
    assert second.startswith("posterior: warning: the keys stay as they were: ") and "sha256' is required" in second
