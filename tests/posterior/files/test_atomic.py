"""Writers that fail, wait for each other, or are killed: the old or the new, and nothing left over."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posterior.errors import PosteriorError
from posterior.files import atomic
from posterior.storage import artefact
from tests.killing import leftovers, snapshot

FORMAT_1 = Path(__file__).parents[1] / "format1"


@pytest.mark.long
def test_a_writer_killed_after_any_step_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    """tests/posterior/storage/steps.py: posteriors (new, replaced, by two renames), calibrations, draws."""
    program = [sys.executable, "-m", "tests.posterior.storage.steps", str(tmp_path / "work")]
    ended = subprocess.run(program, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    steps = json.loads(ended.stdout)
    assert set(steps) == {"new", "replace", "calibrate", "draws", "two renames"} and min(steps.values()) > 15


def put(target: Path, text: str) -> None:
    with atomic.folder(target) as work:
        (work / "deep").mkdir()
        (work / "deep" / "text").write_text(text)
        (work / "deep" / "text").chmod(0o600)


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "parents" / "are made" / "here"
    for text in ("one", "two"):
        put(target, text)
        assert (target / "deep" / "text").read_text() == text
        assert [path.name for path in target.parent.iterdir()] == ["here"]
    assert (target / "deep" / "text").stat().st_mode & 0o777 == 0o644 and target.stat().st_mode & 0o777 == 0o755


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path / "empty", "one")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and (tmp_path / "empty" / "deep").is_dir()


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path: Path, failure: BaseException) -> None:
    put(tmp_path / "it", "one")
    with pytest.raises(type(failure)), atomic.folder(tmp_path / "it") as work:
        (work / "half").write_text("")
        raise failure
    assert (tmp_path / "it" / "deep" / "text").read_text() == "one" and not leftovers(tmp_path)


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def check(target: Path) -> None:
        if (target / "mine").exists():
            raise PosteriorError("not yours")

    with pytest.raises(PosteriorError, match="not yours"), atomic.folder(tmp_path / "it", check):
        (tmp_path / "it").mkdir()
        (tmp_path / "it" / "mine").write_text("mine")
    assert (tmp_path / "it" / "mine").read_text() == "mine" and not leftovers(tmp_path)


def test_leftovers_of_the_killed_are_cleared_by_the_next_writer_of_the_same_name(tmp_path: Path) -> None:
    for name in ("it", "other"):
        (tmp_path / f".{name}.posterior-work" / "new").mkdir(parents=True)
        (tmp_path / f".{name}.posterior-work" / "new" / "half").write_text("")
        (tmp_path / f".{name}.posterior-lock").write_text("")
    put(tmp_path / "it", "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.posterior-lock", ".other.posterior-work", "it"]


def test_a_folder_that_was_moved_away_comes_back_when_it_is_opened(tmp_path: Path) -> None:
    """As a process killed between two renames leaves it, on a file system that cannot exchange names."""
    moved = tmp_path / ".mood.posterior-work" / "old"
    shutil.copytree(FORMAT_1 / "mood", moved)
    assert atomic.moved_away(tmp_path) == [tmp_path / "mood"]
    assert artefact.load(tmp_path / "mood").hash == artefact.load(FORMAT_1 / "mood").hash
    assert snapshot(tmp_path) != {} and not leftovers(tmp_path) and atomic.moved_away(tmp_path) == []


def test_two_folders_change_places(tmp_path: Path) -> None:
    for name in ("a", "b"):
        put(tmp_path / name, name)
    atomic.exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name / "deep" / "text").read_text() for name in ("a", "b")] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        atomic.exchange(tmp_path / "a", tmp_path / "c")


def test_who_does_not_wait_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".it.posterior-lock").write_text("of a process that was killed")
    with atomic.locked(tmp_path / "it"):
        with pytest.raises(PosteriorError, match="another process is at work on .*it; wait"):
            atomic.locked(tmp_path / "it", wait=False).__enter__()
        with atomic.locked(tmp_path / "another", wait=False):
            pass
    assert list(tmp_path.iterdir()) == []
    with atomic.locked(tmp_path / "it", wait=False):
        pass


def test_who_waits_gets_the_lock_of_the_name(tmp_path: Path) -> None:
    """One that waited on a lock that its holder has removed since makes a new one."""
    order: list[int] = []
    held = atomic.locked(tmp_path / "it")
    held.__enter__()
    program = (
        "import sys; from pathlib import Path; from posterior.files import atomic\n"
        "with atomic.locked(Path(sys.argv[1])): print(Path(sys.argv[1]).read_text())"
    )
    waiting = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "it")], stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)
    (tmp_path / "it").write_text("written under the lock")
    held.__exit__(None, None, None)
    assert waiting.communicate()[0] == "written under the lock\n" and order == []
    assert not leftovers(tmp_path)


def test_a_file(tmp_path: Path) -> None:
    for content in (b"one", lambda part: part.write_bytes(b"two")):
        atomic.write(tmp_path / "made" / "it", content)
    assert (tmp_path / "made" / "it").read_bytes() == b"two" and not leftovers(tmp_path)
    assert (tmp_path / "made" / "it").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("content", [b"new", lambda part: part.write_bytes(b"new")])
def test_a_file_is_not_written_through_a_link(tmp_path: Path, content: Any) -> None:
    (tmp_path / "other").write_bytes(b"of somebody")
    (tmp_path / ".it.posterior-part").symlink_to(tmp_path / "other")
    atomic.write(tmp_path / "it", content)
    assert (tmp_path / "it").read_bytes() == b"new" and not (tmp_path / "it").is_symlink()
    assert (tmp_path / "other").read_bytes() == b"of somebody" and not leftovers(tmp_path)


def test_modes_are_those_that_were_there_or_as_the_umask_has_them(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        atomic.write(tmp_path / "it", b"one")
        assert (tmp_path / "it").stat().st_mode & 0o777 == 0o600
        (tmp_path / "it").chmod(0o664)
        atomic.write(tmp_path / "it", b"two")
        assert (tmp_path / "it").stat().st_mode & 0o777 == 0o664
        put(tmp_path / "folder", "one")
        assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "folder" / "deep" / "text").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


@pytest.mark.parametrize(("name", "number"), [("replace", errno.EACCES), ("fsync", errno.EIO), ("open", errno.EROFS)])
def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    atomic.write(tmp_path / "it", b"old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, name, fail)
    with pytest.raises(PosteriorError, match=f"cannot write {tmp_path / 'it'}: {os.strerror(number)}; make room"):
        atomic.write(tmp_path / "it", b"new")
    monkeypatch.undo()
    assert (tmp_path / "it").read_bytes() == b"old" and not leftovers(tmp_path)
