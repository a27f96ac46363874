"""Change posterior.json and give it the integrity that belongs to it, so that only what is changed can be noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posterior.storage import record


def edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / record.NAME).read_text()) | changes
    (folder / record.NAME).write_text(json.dumps(content | {"integrity": record._integrity(content)}))


def rehash(folder: Path) -> None:
    """Make the listed hashes match the files again."""
    files = json.loads((folder / record.NAME).read_text())["files"]
    edit(folder, files={name: record.file_hash(folder / name) for name in files})
