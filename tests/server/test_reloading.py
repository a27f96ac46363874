"""Hot load and unload under many clients, for a while: `make reload` does it for ten minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server import folders
from tests.server.reloading import reload


@pytest.mark.long
def test_loading_every_two_seconds_under_eight_clients(tmp_path: Path) -> None:
    report = reload(tmp_path, folders.cut_base(tmp_path), seconds=40, clients=8, every=2)
    assert not report.wrong, report.wrong[:5]
    assert report.changes >= 6 and report.statuses[200] > 100 and report.statuses[404] > 0
    assert set(report.statuses) <= {200, 404, 429} and len(report.models) == 3
