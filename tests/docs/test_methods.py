"""The pages have a row for every method of fitting and every calibrator."""

from __future__ import annotations

import re

import pytest

from posterior.calibration.scalers import CALIBRATORS
from posterior.cli.fit import METHODS
from tests.docs.blocks import ROOT


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("methods.md", set(METHODS)),
        ("library.md", {method.__name__ for method in METHODS.values()}),
        ("calibrate.md", set(CALIBRATORS)),
    ],
)
def test_every_one_has_a_row(page: str, names: set[str]) -> None:
    first = re.findall(r"^\| ([^|]*) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert names <= {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
