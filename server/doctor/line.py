"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Line:
    """check: what was looked at; what: what was found; do: what to do about it, None where it is ok."""

    check: str
    status: Status
    what: str
    do: str | None = None
