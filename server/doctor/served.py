"""The posterior folders that are to be served."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from posterior.errors import PosteriorError
from posterior.storage import record
from posterior.storage.record import Record
from server.doctor.line import Line

LONGEST_HASHED = 2**30  # bytes of a file: more would take seconds to hash


def posteriors(root: Path) -> Iterator[Line]:
    """Whether each posterior folder is as it was written."""
    found = folders(root)
    if not found:
        yield Line("posteriors", "fail", f"{root} holds no posterior folder", "name another with --posteriors")
    for folder in found:
        try:
            known = record.read(folder)
            changed = _changed(folder, known)
        except PosteriorError as error:
            yield Line("posteriors", "fail", str(error))
            continue
        if changed:
            yield Line("posteriors", "fail", f"{folder / changed} is missing or was changed", "restore it, or refit")
        else:
            family, base = known.content["family"], known.content["base"]["id"]
            yield Line("posteriors", "ok", f"{folder.name} ({family}), of {base}")


def folders(root: Path) -> list[Path]:
    """The posterior folders below it."""
    return sorted(path.parent for path in root.glob(f"*/{record.NAME}"))


def readable(root: Path) -> Iterator[tuple[Path, Record]]:
    """Those whose records can be read."""
    for folder in folders(root):
        with contextlib.suppress(PosteriorError):
            yield folder, record.read(folder)


def _changed(folder: Path, found: Record) -> str | None:
    """The first file that is not as the record says. Large ones are looked for only."""
    for name, digest in found.files.items():
        path = folder / name
        if not path.is_file() or (path.stat().st_size < LONGEST_HASHED and record.file_hash(path) != digest):
            return name
    return None


def has_laplace(root: Path) -> bool:
    """Whether a posterior below it is one whose predictive is linearised, in a worker of its own."""
    return any(found.content["family"] == "laplace" for _, found in readable(root))
