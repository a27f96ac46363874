"""The command `posterior`: help, mistakes in one line, and what `serve` refuses before it loads anything."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from server import cli
from server.main import SHIPPED


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in cli.VERBS)


def test_unknown_verbs_and_flags_are_usage_errors() -> None:
    for arguments in (["dance"], [], ["serve", "--port", "many"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


def test_a_reader_that_has_enough_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "server.cli", "inspect", str(SHIPPED / "sentiment")]
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["serve", *arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("posterior: ") and text.count("\n") == 1
    return text


def test_serve_refuses_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTERIOR_API_KEY", raising=False)
    assert "without a key" in refused(capsys, "--host", "0.0.0.0")
    assert "at least 2" in refused(capsys, "--particles", "1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in refused(capsys, "--port", str(taken.getsockname()[1]))
