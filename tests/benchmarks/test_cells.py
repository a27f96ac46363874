"""The rows that benchmarks.cells gives a cell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cells
from benchmarks.cells import read


def questions(names: list[str], choices: int = 4) -> str:
    answers = [str(n) for n in range(choices)]
    return "".join(json.dumps({"prompt": name, "choices": answers, "label": 0}) + "\n" for name in names)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """ARC-Easy in small: 5 training rows and 9 test rows, of which one is also a training row and one has 3 choices."""
    for name in ("arc_easy", *cells.OOD):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(
            questions(["train 0"]) + questions(["three"], 3) + questions([f"{name} {n}" for n in range(7)])
        )
    (tmp_path / "arc_easy" / "train.jsonl").write_text(questions([f"train {n}" for n in range(5)]))
    return tmp_path


@pytest.mark.parametrize(("asked", "count"), [(None, 6), (0, 0), (3, 3), (100, 7)])
def test_as_many_test_rows_as_asked(folder: Path, monkeypatch: pytest.MonkeyPatch, asked: int | None, count: int):
    """By default, what a set of its kind has; none, where none are asked for."""
    monkeypatch.setattr(cells, "TEST", 5)
    monkeypatch.setattr(cells, "QUESTIONS", 6)
    data = read("arc_easy", folder, 2, asked)
    assert [row["prompt"] for row in data.test] == [f"arc_easy {n}" for n in range(count)]
    assert [row["prompt"] for row in data.calibration] == ["train 2", "train 3", "train 4"]
    assert data.test == [] or data.test[0]["choices"] == [" 0", " 1", " 2", " 3"]
    assert len(read("yelp", None, 2, asked).test) == {None: 5, 0: 0, 3: 3, 100: 100}[asked]
