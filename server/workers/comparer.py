"""Models that tell meanings apart, in a process of their own: comparisons one after the other, on the CPU.

A call is one round of comparisons of one prompt's samples, so that many requests take turns, and one whose client has
left asks no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from posterior.errors import PosteriorError
from posterior.storage.record import file_hash
from server import tracing
from server.errors import Busy, Refused
from server.metrics import Metrics
from server.workers import comparing
from server.workers.process import Worker

DIGITS = 12  # of a model's digest
MAX_WAITING = 256  # rounds; each request has one at a time


class Comparer:
    """The server's end of the worker process. names: the ways to tell meanings apart that it has a model for."""

    def __init__(self, folders: Mapping[str, Path], threshold: float, metrics: Metrics) -> None:
        self.names = frozenset(folders)
        own = {"embedding": f"{threshold:g}"}  # what else changes who means the same
        self._identities = {name: identified(name, folder, own.get(name, "")) for name, folder in folders.items()}
        self._waiting = 0
        self._worker = Worker(
            "the comparison of meanings",
            "ask for the meaning 'exact'",
            comparing.load,
            (dict(folders), threshold),
            loaded=_ready,
            lost=metrics.meaning_restarts.inc,
        )

    async def start(self) -> None:
        """Wait until the worker holds its models; raises what kept it from loading."""
        await self._worker.start()

    def identity(self, name: str) -> str:
        """The name with a digest of its model, and of the threshold of embeddings."""
        return self._identities[name]

    def check(self) -> None:
        """Raises Unavailable while no worker holds the models."""
        self._worker.check()

    async def same(self, name: str, question: str, text: str, others: Sequence[str]) -> list[bool]:
        """As posterior.meaning.Comparison, by the model of that name.

        Raises:
            Refused: a text is longer than the model reads.
            Unavailable: there is no worker. Busy: too many wait for it.
        """
        self.check()
        if self._waiting >= MAX_WAITING:
            raise Busy(f"{self._waiting} requests already wait for the comparison of meanings; try again later")
        self._waiting += 1
        try:
            with tracing.span("meanings", comparisons=len(others)):
                return await self._worker.run(comparing.same, name, question, text, list(others))
        except PosteriorError as error:
            raise Refused(str(error), "uncertainty.meaning") from error
        finally:
            self._waiting -= 1

    def stop(self) -> None:
        """End the worker, whatever it is doing."""
        self._worker.stop()


def identified(name: str, folder: Path, more: str) -> str:
    """The name with a digest of the folder's model, and of what else changes who means the same."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors") and path.is_file())
    parts = [f"{path.relative_to(folder)} {file_hash(path)}" for path in files]
    return f"{name}-{hashlib.sha256(' '.join([*parts, more]).encode()).hexdigest()[:DIGITS]}"


async def _ready(_: None) -> None:
    pass
