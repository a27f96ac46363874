"""posterior.json: what a posterior folder is, in format 2, and in format 1 of folders that were written before.

    format, family, base {id, revision, hash}, task, lora, weights (of particles), width (of Laplace draws)
    files         sha256 of every file but posterior.json and the calibrations
    provenance    {prior, fit}: how it was made, for people to read
    integrity     sha256 of all of the above

A posterior's hash names its distribution: it covers the base's weights, the task, what makes the update of A and B,
and the tensors, and neither names, places nor provenance. Two equal fits have the same hash. In format 1 it covers the
whole record, and stays what it was, so that calibrations of those folders go on to match.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posterior.errors import PosteriorError
from posterior.files import objects

FORMAT = 2
NAME = "posterior.json"
ROWS = "rows.safetensors"  # digests of the training rows; no part of the distribution
UPDATE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # makes the update of A and B
LORA = (*UPDATE, "target_modules", "lora_dropout")


@dataclass(frozen=True)
class Record:
    """A posterior.json that was read; `content` is the JSON with `prior` and `fit` at its top."""

    hash: str
    content: dict[str, Any]

    @property
    def files(self) -> dict[str, str]:
        return dict(self.content["files"])


def write(
    folder: Path,
    *,
    family: str,
    base: Mapping[str, Any],
    task: Mapping[str, Any],
    lora: Mapping[str, Any],
    weights: list[float],
    width: float,
    provenance: Mapping[str, Any],
) -> str:
    """Write the record of the files that are in `folder`; returns the posterior's hash."""
    files = {str(path.relative_to(folder)): file_hash(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    content = {
        "format": FORMAT,
        "family": family,
        "base": dict(base),
        "task": dict(task),
        "lora": {key: lora.get(key) for key in LORA},
        "weights": weights,
        "width": width,
        "files": files,
        "provenance": dict(provenance),
    }
    content = json.loads(json.dumps(content))  # as it will be read: with names for keys, not numbers
    content["integrity"] = _integrity(content)
    (folder / NAME).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return _identity(content)


def read(folder: Path) -> Record:
    """The record of a folder. Raises PosteriorError where there is none, it was changed, or it is of another format."""
    content = _parse(folder)
    found = content.get("format")
    if found == 1:
        return Record(_digest({key: value for key, value in content.items() if key != "calibration"}), content)
    if isinstance(found, int) and found > FORMAT:
        raise PosteriorError(
            f"{folder} has posterior format {found}, which is newer than the {FORMAT} this version reads; upgrade "
            "posterior-server"
        )
    if found != FORMAT:
        raise PosteriorError(f"{folder} has posterior format {found!r}; this version reads 1 and {FORMAT}; refit")
    if content.get("integrity") != _integrity(content):
        raise PosteriorError(f"{folder}/{NAME} was changed after the fit (its integrity differs); restore it or refit")
    try:
        return Record(_identity(content), content | dict(content["provenance"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PosteriorError(damaged(folder, error)) from None


def damaged(folder: Path, error: Exception) -> str:
    """What to say of a record that lacks something."""
    return f"{folder}/{NAME} is damaged: {type(error).__name__} at {error}; restore it or refit"


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _identity(content: Mapping[str, Any]) -> str:
    lora = content["lora"]
    return _digest(
        {
            "family": content["family"],
            "base": content["base"]["hash"],
            "task": content["task"],
            "update": {
                "r": lora["r"],
                "lora_alpha": float(lora["lora_alpha"]),
                "use_rslora": bool(lora["use_rslora"]),
                "rank_pattern": lora["rank_pattern"] or {},
                "alpha_pattern": lora["alpha_pattern"] or {},
            },
            "weights": content["weights"],
            "width": float(content["width"]),
            "tensors": {
                name: digest
                for name, digest in content["files"].items()
                if name.endswith(".safetensors") and name != ROWS
            },
        }
    )


def _integrity(content: Mapping[str, Any]) -> str:
    return "sha256:" + _digest({key: value for key, value in content.items() if key != "integrity"})


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _parse(folder: Path) -> dict[str, Any]:
    try:
        return objects.read(folder / NAME)
    except OSError:
        raise PosteriorError(
            f"{folder} is no posterior folder: it has no readable {NAME}; make one with `posterior fit`"
        ) from None
    except ValueError:
        raise PosteriorError(f"{folder}/{NAME} is not a JSON object; restore it or refit") from None
