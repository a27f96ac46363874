from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("original") / "tiny"


@pytest.fixture
def folder(run_fit, original, tmp_path) -> Path:
    """A posterior that was fitted once, without its probes: they belong to the distribution that tests change."""
    if not original.exists():
        run_fit(original)
        shutil.rmtree(original / "calibration")
    return shutil.copytree(original, tmp_path / "tiny")
