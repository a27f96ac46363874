"""Where a posterior may be written: never over anything but one posterior."""

from __future__ import annotations

import os
import re
from pathlib import Path

from posterior.calibration import familiarity, records
from posterior.errors import PosteriorError
from posterior.files import atomic
from posterior.storage import record

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a posterior's folder, which is its name when served


def destination(out: Path | str) -> Path:
    """The absolute path of a place where a posterior may be written. Raises PosteriorError for any other.

    Its name can be a model's. Nothing is there, or an empty folder, or one posterior and nothing else.
    """
    folder = Path(os.path.abspath(out))
    if not str(out) or not NAME.fullmatch(folder.name):
        raise PosteriorError(
            f"cannot write {str(out)!r}: the folder's name is the model's name when served; end it with a name of "
            "letters, digits, '.', '_' and '-', such as posteriors/reviews"
        )
    try:
        check_replaceable(folder)
        parent = next(path for path in folder.parents if _is_there(path))
    except OSError as error:
        raise PosteriorError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise PosteriorError(
            f"cannot write {folder}: {parent} is no folder that you may write into; choose another folder"
        )
    return folder


def _is_there(path: Path) -> bool:
    """As os.path.lexists, but a name that cannot be is an OSError."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_replaceable(folder: Path) -> None:
    """Raises PosteriorError where more is there than one posterior."""
    atomic.recover(folder)
    if folder.is_symlink() or (os.path.lexists(folder) and not folder.is_dir()):
        kind = "a symbolic link" if folder.is_symlink() else "not a folder"
        raise PosteriorError(f"{folder} is {kind}; choose another folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        listed = [Path(name) for name in (record.NAME, *record.read(folder).files)]
    except (PosteriorError, KeyError, TypeError, ValueError):
        raise PosteriorError(
            f"{folder} is not empty, and no posterior that this version can read; nothing was touched: choose another "
            "folder, or move what is there"
        ) from None
    own = {*listed, *(parent for path in listed for parent in path.parents), Path(records.FOLDER)}
    inside = sorted(path.relative_to(folder) for path in folder.rglob("*"))  # of a posterior, never of a whole disk
    ours = (records.is_record, familiarity.is_familiarity)
    foreign = [path for path in inside if path not in own and not any(is_ours(path) for is_ours in ours)]
    if foreign:
        raise PosteriorError(
            f"{folder} holds {str(foreign[0])!r}, which is no part of a posterior; nothing was touched: choose another "
            "folder, or move it"
        )
