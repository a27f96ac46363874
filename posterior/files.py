"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from posterior.errors import PosteriorError


def write(path: Path, content: bytes) -> None:
    """Put a file in the place of what was there, atomically, and make its folder if need be. Raises PosteriorError."""
    work = None
    try:
        path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            work = Path(file.name)
            file.write(content)
        work.chmod(0o644)
        os.replace(work, path)
    except OSError as error:
        raise PosteriorError(f"cannot write {path}: {error.strerror}; make room or mend its permissions") from error
    finally:
        if work is not None:
            work.unlink(missing_ok=True)
