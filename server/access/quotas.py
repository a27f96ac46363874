"""What a key may use a minute, in memory.

Each limit is a token bucket (Turner, "New directions in communications", 1986). It holds what is used in a minute at
most, and fills steadily. It may be overdrawn, because the tokens of a request are known only after its answer: what is
owed is waited for, so that the mean over a long time is the limit whatever a request takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

MINUTE = 60.0  # seconds
Clock = Callable[[], float]


class Allowance:
    """So much a minute."""

    def __init__(self, limit: int, left: float | None = None, clock: Clock = time.monotonic) -> None:
        """left: how much of it there is now (None: all of it)."""
        self.limit = limit
        self._left = float(limit) if left is None else min(left, limit)
        self._clock = clock
        self._seen = clock()

    @property
    def left(self) -> float:
        """How much may be used now; below 0, how much is owed."""
        now = self._clock()
        self._left = min(self._left + (now - self._seen) * self.limit / MINUTE, self.limit)
        self._seen = now
        return self._left

    def spend(self, amount: int) -> None:
        """Use this much, also of what is not there."""
        self._left = self.left - amount

    def seconds_until(self, amount: float) -> float:
        """How long it takes until so much is there; 0.0 where it is."""
        return max(amount - self.left, 0.0) * MINUTE / self.limit


@dataclass(frozen=True)
class Wait:
    """Why a request has to wait: what is used up ("requests" or "tokens"), its limit a minute, and for how long."""

    what: str
    limit: int
    seconds: int


class Quota:
    """The requests and tokens of one key. What it has no limit of, it may use without end."""

    def __init__(self) -> None:
        self._allowances: dict[str, Allowance] = {}

    def limit(self, **limits: int | None) -> None:
        """Set how many `requests` and `tokens` a minute there are (None: no limit). What has been used stays used."""
        before = self._allowances
        self._allowances = {
            what: Allowance(limit, before[what].left if what in before else None)
            for what, limit in limits.items()
            if limit is not None
        }

    def enter(self) -> Wait | None:
        """Count one request, if it may be answered now; else say how long it has to wait."""
        waits = [
            Wait(what, each.limit, math.ceil(seconds))
            for what, each in self._allowances.items()
            if (seconds := each.seconds_until(1))
        ]
        if waits:
            return max(waits, key=lambda wait: wait.seconds)
        self.spend("requests", 1)
        return None

    def spend(self, what: str, amount: int) -> None:
        """Count what was used."""
        if what in self._allowances:
            self._allowances[what].spend(amount)

    def headers(self) -> dict[str, str]:
        """What is left, as OpenAI tells it."""
        found = {}
        for what, each in self._allowances.items():
            found[f"x-ratelimit-limit-{what}"] = str(each.limit)
            found[f"x-ratelimit-remaining-{what}"] = str(max(math.floor(each.left), 0))
            found[f"x-ratelimit-reset-{what}"] = f"{math.ceil(each.seconds_until(each.limit))}s"
        return found
