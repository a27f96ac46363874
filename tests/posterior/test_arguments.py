"""Options that several verbs share: escapes, places, devices and numbers, checked before any work."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from posterior import arguments
from posterior.arguments import POSITIVE, Range, check_device, check_numbers, check_out, unescaped
from posterior.errors import PosteriorError


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (r"{text}\nSentiment:", "{text}\nSentiment:"),
        (r"a\tb\\c", "a\tb\\c"),
        (r"Simplify \\nabla {text}", r"Simplify \nabla {text}"),
        (r"\\\n", "\\\n"),
        ("a real\nbreak", "a real\nbreak"),
        ("", ""),
    ],
)
def test_escapes(given: str, meant: str) -> None:
    assert unescaped("--template", given) == meant
    args = argparse.Namespace(task="choice", template="{t}" + given, answers=[given + "a", "b"], chat=False)
    task = arguments.task(args)
    assert (task.template, task.answers) == ("{t}" + meant, (meant + "a", "b")), "one rule for both"


@pytest.mark.parametrize(("given", "named"), [(r"\frac {t}", r"\f"), ("end\\", "\\"), ("\\\n", "\\"), (r"\x41", r"\x")])
def test_other_backslashes_are_refused(given: str, named: str) -> None:
    with pytest.raises(PosteriorError) as caught:
        unescaped("--answers", given)
    assert str(caught.value).startswith(f"--answers holds {named}") and r"\\ a backslash" in str(caught.value)


@pytest.mark.parametrize("out", ["", ".", "/", "..", "a/..", "a b", "-x", ".hidden", "x" * 65, "naïve", "x/../.."])
def test_names_that_cannot_be_served(out: str) -> None:
    with pytest.raises(PosteriorError, match="the folder's name is the model's name"):
        check_out(out)


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "file" / "x" / "y"):
        with pytest.raises(PosteriorError, match="file is a file, not a folder; name another place"):
            check_out(str(out))
    with pytest.raises(PosteriorError, match="File name too long"):
        check_out(str(tmp_path / ("y" * 300) / "x"))
    for out in (tmp_path / "folder", tmp_path / "new" / "x"):
        check_out(str(out))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PosteriorError, match="no permission to write in"):
        check_out(str(tmp_path / "new" / "x"))


@pytest.mark.parametrize("device", ["", "gpu", "cuda:99", "cuda:x", "meta", "cpu:0", "CPU"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(PosteriorError, match="--device"):
        check_device(device)
    check_device("cpu")


def test_ranges() -> None:
    for value in (0, -1, float("nan"), float("inf"), float("-inf")):
        assert value not in POSITIVE
        with pytest.raises(PosteriorError, match=f"--a-b is {value}; it must be above 0$"):
            check_numbers(argparse.Namespace(a_b=value), {"a_b": POSITIVE})
    assert 1e30 in POSITIVE and 1 in Range(1, 2) and 3 not in Range(1, 2)
    assert str(Range(1, 2**20)) == "at least 1 and at most 1048576"
    check_numbers(argparse.Namespace(a=None), {"a": Range(1)})
