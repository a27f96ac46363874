"""Prompts that may have ended a worker."""

from __future__ import annotations

import time
from collections.abc import Iterable

from posterior.data.candidates import Candidates

STRIKES, FORGIVEN_SECONDS = 2, 600.0  # workers that a prompt may end within that time

Prompt = tuple[str, tuple[int, ...], Candidates]  # posterior, tokens, answers


class Suspects:
    """Prompts whose batch ended a worker: when, within the last FORGIVEN_SECONDS."""

    def __init__(self) -> None:
        self._times: dict[Prompt, list[float]] = {}

    def blame(self, batch: Iterable[Prompt]) -> None:
        """Note that these prompts were in the batch that ended a worker."""
        now = time.monotonic()
        for prompt in batch:
            self._times.setdefault(prompt, []).append(now)
        self._times = {key: times for key, times in self._times.items() if now - times[-1] < FORGIVEN_SECONDS}

    def acquit(self, batch: Iterable[Prompt]) -> None:
        """Forget prompts that have been answered."""
        for prompt in batch:
            self._times.pop(prompt, None)

    def strikes(self, prompt: Prompt) -> int:
        """How many workers this prompt may have ended within FORGIVEN_SECONDS."""
        return sum(time.monotonic() - each < FORGIVEN_SECONDS for each in self._times.get(prompt, []))
