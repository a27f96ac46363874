"""Records as JSON files with the hash of what they hold, so that one that was changed by hand is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from posterior.calibration.scalers import Part
from posterior.errors import PosteriorError
from posterior.files import atomic, objects

P = TypeVar("P", bound=Part)

AGAIN = "delete it, or run `posterior calibrate` again"


def write(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a record with its hash, atomically; returns where. Raises PosteriorError."""
    text = json.dumps({**content, "hash": digest(content)}, indent=1, allow_nan=False) + "\n"
    atomic.write(path, text.encode())
    return path


def read(path: Path) -> dict[str, Any]:
    """The record without its hash, which has been checked. Raises PosteriorError, also for a path that leads out of
    the posterior's folder."""
    if not path.resolve().is_relative_to(path.parents[1].resolve()):
        raise PosteriorError(f"{path} leads outside the folder; refused")
    try:
        content = objects.read(path)
        if content.pop("hash", None) != digest(content):
            raise PosteriorError(f"{path} is not what `posterior calibrate` wrote (its hash differs); {AGAIN}")
    except (OSError, ValueError):
        raise PosteriorError(f"{path} is no readable JSON record; {AGAIN}") from None
    return content


def parsed(kind: type[P], content: Mapping[str, Any], path: Path) -> P:
    """The content of a file as a record of this kind. Raises PosteriorError."""
    try:
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PosteriorError(f"{path} has an unreadable {where or 'record'}: {first['msg']}; {AGAIN}") from None


def digest(content: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON."""
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
