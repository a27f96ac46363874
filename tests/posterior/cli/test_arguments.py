"""Options that several verbs share: escapes, places, devices and numbers, checked before any work."""

from __future__ import annotations

import argparse

import pytest

from posterior.cli import arguments
from posterior.cli.arguments import unescaped
from posterior.errors import PosteriorError
from posterior.models import devices
from posterior.settings import POSITIVE, Range


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
    args = argparse.Namespace(
        task="choice", template="{t}" + given, answers=[given + "a", "b"], chat=False, question=None, labels="words"
    )
    task = arguments.task(args)
    assert (task.template, task.answers) == ("{t}" + meant, (meant + "a", "b")), "one rule for both"


@pytest.mark.parametrize(("given", "named"), [(r"\frac {t}", r"\f"), ("end\\", "\\"), ("\\\n", "\\"), (r"\x41", r"\x")])
def test_other_backslashes_are_refused(given: str, named: str) -> None:
    with pytest.raises(PosteriorError) as caught:
        unescaped("--answers", given)
    assert str(caught.value).startswith(f"--answers holds {named}") and r"\\ a backslash" in str(caught.value)


@pytest.mark.parametrize("device", ["", "gpu", "cuda:99", "cuda:x", "meta", "cpu:0", "CPU"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(PosteriorError, match="device"):
        devices.check(device)
    assert devices.check("cpu") == "cpu"


def test_ranges() -> None:
    for value in (0, -1, float("nan"), float("inf"), float("-inf")):
        assert value not in POSITIVE
    assert 1e30 in POSITIVE and 1 in Range(1, 2) and 3 not in Range(1, 2)
    assert str(Range(1, 2**20)) == "at least 1 and at most 1048576"
