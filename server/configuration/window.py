"""Which answers and outcomes count: the newest, by number or by age."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from posterior.errors import PosteriorError

DAY = 86400.0  # seconds
COUNT = 1000  # of the default window
MOST = 10_000  # rows of one kind that are read at a time
WINDOW = f"a number of them up to {MOST}, such as {COUNT}, or of days, such as 30d"


@dataclass(frozen=True)
class Window:
    """Which answers and outcomes count: the newest `count` of a posterior, and where `days` says so none older."""

    count: int = COUNT
    days: float | None = None

    @classmethod
    def parsed(cls, text: str) -> Window:
        """ "1000" or "30d". Raises PosteriorError."""
        found = re.fullmatch(r"(\d{1,6})(d?)", text)
        number = int(found[1]) if found else 0
        if not found or not 1 <= number <= (36500 if found[2] else MOST):
            raise PosteriorError(f"--outcomes-window is {text!r}; give {WINDOW}")
        return cls(MOST, float(number)) if found[2] else cls(number)

    def __str__(self) -> str:
        return str(self.count) if self.days is None else f"{self.days:g}d"

    @property
    def since(self) -> float:
        """Unix time of the oldest that counts."""
        return 0.0 if self.days is None else time.time() - DAY * self.days
