"""The command `posterior`: help, mistakes in one line, and what `serve` refuses before it loads anything."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from posterior.errors import PosteriorError
from server import cli
from server.configuration.schema import SHIPPED


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
    for name in ("POSTERIOR_API_KEY", "POSTERIOR_KEYS"):
        monkeypatch.delenv(name, raising=False)
    assert "without a key" in refused(capsys, "--host", "0.0.0.0")
    assert "at least 2" in refused(capsys, "--particles", "1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --host or --port" in refused(capsys, "--port", str(taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--port", "99999"), ("--port", "-1"), ("--particles", "0"), ("--particles", "1000000"),
        ("--max-num-seqs", "0"), ("--kv-cache-gib", "nan"), ("--kv-cache-gib", "-1"), ("--kv-cache-gib", "inf"),
        ("--gpu-memory-utilization", "nan"), ("--gpu-memory-utilization", "1.5"), ("--max-model-len", "0"),
    ],
)  # fmt: skip
def test_numbers_of_serve_are_checked_first(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    assert f"{option} is {value.removesuffix('.0')}" in refused(capsys, option, value).replace(".0;", ";")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_and_names_what_is_wrong_in_one_line(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "--help"])
    assert caught.value.code == 0 and f"posterior {verb}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main([verb, "x", "--out", "x", "--nothing\nat all"])
    text = capsys.readouterr().err
    assert caught.value.code == 2 and text.count("\n") == 1 and f"see `posterior {verb} --help`" in text


class Verb:
    """A module of a verb whose `run` raises."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        pass

    def run(self, _args: argparse.Namespace) -> None:
        if self.error is not None:
            raise self.error


def torch_out_of_memory() -> Exception:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


KNOWN = [
    (lambda: PosteriorError("a\nb"), 2, "a b"),
    (lambda: OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "/x/y: No space left on device; free some"),
    (
        lambda: PermissionError(errno.EACCES, "Permission denied", "/x"),
        2,
        "/x: Permission denied; change its permissions",
    ),
    (lambda: OSError(errno.EROFS, "Read-only file system", "/x"), 2, "/x: Read-only file system; name a place"),
    (
        lambda: FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"),
        2,
        "/x: No such file .*; check the path",
    ),
    (lambda: OSError(errno.EMFILE, "Too many open files"), 2, "Too many open files; allow more open files: `ulimit"),
    (lambda: OSError("Can't load it\nat all"), 2, "Can't load it; check the machine"),
    (lambda: MemoryError(), 2, r"memory ran out \(MemoryError\); use a smaller --batch-size"),
    (torch_out_of_memory, 2, "memory ran out .CUDA out of memory. Tried to allocate 2 GiB.;"),
    (lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "memory ran out"),
    (lambda: BrokenProcessPool("a child died"), 2, "a worker process was killed"),
    (lambda: KeyboardInterrupt(), 130, "stopped"),
    (lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, None),
]


@pytest.mark.parametrize(("make", "status", "match"), KNOWN)
def test_every_kind_of_error_is_one_line(
    make: Any, status: int, match: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "posterior.cli.inspect", Verb(make()))
    assert cli.main(["inspect"]) == status
    text = capsys.readouterr().err
    assert text == "" if match is None else re.fullmatch(f"posterior: {match}.*\n", text)


@pytest.mark.parametrize("error", [KeyError("x"), UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no"), ValueError("a\nb")])
def test_a_fault_of_ours_is_one_line_and_a_file(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "posterior.cli.inspect", Verb(error))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(cli.TRACEBACK, raising=False)
    assert cli.main(["inspect"]) == 1
    text = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert text.startswith(f"posterior: a fault of ours, {type(error).__name__}: ") and text.count("\n") == 1
    assert str(file) in text and "Traceback" in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(cli.TRACEBACK, "1")
    assert cli.main(["inspect"]) == 1 and "Traceback" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1


def test_sigterm_ends_a_verb_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Verb):
        def run(self, _args: argparse.Namespace) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("still here")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(sys.modules, "posterior.cli.inspect", Killed(None))
    with pytest.raises(SystemExit) as caught:
        cli.main(["inspect"])
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Stopped(Verb):
        def run(self, _args: argparse.Namespace) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("still here")

    monkeypatch.setitem(sys.modules, "posterior.cli.inspect", Stopped(None))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert cli.main(["inspect"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "posterior: stopped\n"


def test_arguments_that_are_no_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ask", "caf\udce9"]) == 2
    assert re.fullmatch(
        r"posterior: argument 2, 'caf.udce9', holds .*not UTF-8; write it in UTF-8\n", capsys.readouterr().err
    )


EMPTY = [
    ("inspect", ""), ("evaluate", "x", ""), ("evaluate", "x", "y", "--report="), ("calibrate", "x", "y", "--base="),
    ("fit", "x", "--out=x", "--prior-precision="), ("fit", "x", "--out=x", "--heldout="), ("fit", "x", "--out", ""),
    ("fit", "x", "--out=x", "--answers", "a", ""), ("import", "x", "", "--out=x", "--template=y"),
    ("serve", "--posteriors="), ("serve", "--host="), ("serve", "--base="), ("ask", "x", "--model="),
    ("serve", "--keys="), ("key", ""),
]  # fmt: skip


@pytest.mark.parametrize("arguments", EMPTY, ids=" ".join)
def test_an_empty_value_is_not_the_default(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    text = capsys.readouterr().err
    assert caught.value.code == 2 and "it is empty; give a value, or leave it out" in text and text.count("\n") == 1


def test_what_a_user_wrote_is_not_repeated_at_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "a" * 20_000]) == 2
    text = capsys.readouterr().err
    assert len(text) < 2000 and " ... " in text
    with pytest.raises(SystemExit):
        cli.main(["fit", "x", "--out=x", "--method", "a" * 20_000])
    assert len(capsys.readouterr().err) < 2000


@pytest.mark.parametrize("closed", ["<&- >&-", ">&- 2>&-", ">&-"])
def test_closed_streams(closed: str) -> None:
    command = f"exec {shlex.quote(sys.executable)} -m server.cli --help {closed}"
    done = run_shell(command)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["--help", f"inspect {SHIPPED / 'sentiment'}"])
def test_a_full_stdout_is_one_line(words: str) -> None:
    done = run_shell(f"exec {shlex.quote(sys.executable)} -m server.cli {words} > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "posterior: No space left on device; free some space and run the same command again\n"


def run_shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", command], capture_output=True, encoding="utf-8", timeout=120, check=False)
