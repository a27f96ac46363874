"""Free memory: the machine's, or what a container's limit leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.workers import memory


def test_a_limit_of_any_group_above_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "system" / "ours"
    inner.mkdir(parents=True)
    monkeypatch.setattr(memory, "CGROUPS", ((tmp_path, "memory.max", "memory.current"),))
    for folder, limit, used in ((inner, "max", 7), (inner.parent, "1000", 600)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    assert memory._below_limits("0::/system/ours\n") == [500.0]
    assert memory._below_limits("3:cpuset:/system/ours\n") == []
    (inner / "memory.max").write_text("50\n")
    assert memory._below_limits("0::/system/ours\n") == [143.0, 500.0]


def test_this_machine_has_some() -> None:
    assert 0 < memory.free("cpu") < 2**50
