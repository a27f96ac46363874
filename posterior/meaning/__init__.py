"""Which texts mean the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Grouping(Protocol):
    """A way to tell meanings apart."""

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """The number of each text's meaning; meanings are numbered from 0 in the order in which they first appear."""
        ...
