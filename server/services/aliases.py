"""Where aliases lead, kept in aliases.json beside the posterior folders, so that a restart changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posterior.errors import PosteriorError
from posterior.files import atomic, objects
from posterior.storage.destination import NAME
from posterior.validation import complaint

FILE = "aliases.json"

Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Label = Annotated[str, Field(pattern=f"^{NAME.pattern}@[0-9a-f]{{12}}$")]  # name@hash of a posterior


class Alias(BaseModel):
    """The posterior that it leads to, and the one before, to which a rollback leads."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    posterior: Label
    previous: Label | None = None

    def moved(self, label: str) -> Alias:
        """The alias once it leads to another posterior."""
        return self if label == self.posterior else Alias(posterior=label, previous=self.posterior)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    aliases: dict[Name, Alias]


def read(root: Path) -> dict[str, Alias]:
    """The aliases of a folder of posteriors. Raises PosteriorError for a file that makes no sense."""
    path = root / FILE
    if not path.exists():
        return {}
    try:
        content = objects.read(path)
        return dict(_File.model_validate(content).aliases)
    except ValidationError as error:
        raise PosteriorError(f"{path}: {complaint(error, content)[1]}; correct it, or delete it") from error
    except (OSError, ValueError) as error:
        raise PosteriorError(f"{path} is no readable JSON object; correct it, or delete it") from error


def write(root: Path, aliases: Mapping[str, Alias]) -> None:
    """Keep these instead. Raises PosteriorError, and then the file is as it was."""
    content = {"format": 1, "aliases": {name: alias.model_dump() for name, alias in sorted(aliases.items())}}
    atomic.write(root / FILE, (json.dumps(content, indent=1) + "\n").encode())
