"""Calibrations that change while the server runs: `posterior calibrate` writes them, and the server takes them up.

It looks at the names and times of the files in each posterior's folder calibration/, and reads them once they have
stayed the same from one look to the next: a calibration writes several, each at once. Requests that have begun finish
with what they began with. A signal would do as well, but needs somebody who knows the process; this works the same in a
container, and for several servers that share a folder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from posterior.calibration.records import FOLDER
from posterior.errors import PosteriorError
from posterior.storage import artefact
from posterior.storage.artefact import Posterior
from server.console import say
from server.services.predictive import Service
from server.services.registry import Registry

EVERY_SECONDS = 2.0

Look = frozenset[tuple[str, int, int, int]]  # name, time, size and number of each file
Take = Callable[[Mapping[str, Posterior]], Awaitable[None]]  # serves posteriors, by their hashes, as they are now


async def watch(service: Service, read: Mapping[str, Look], take: Take) -> None:
    """Takes up calibrations until it is cancelled. read: the `looks` when the service's own were read."""
    watcher = Watcher(service, read)
    while True:
        await asyncio.sleep(EVERY_SECONDS)
        if found := await asyncio.to_thread(watcher.changed):
            await take(found)


class Watcher:
    """What the folders of a service's posteriors looked like: when they were read, and at the last look."""

    def __init__(self, service: Service, read: Mapping[str, Look]) -> None:
        self._service = service
        self._read, self._last = dict(read), dict(read)

    def changed(self) -> Mapping[str, Posterior]:
        """By their hashes, the posteriors whose calibrations have changed, with the new ones. One that cannot be read
        keeps what it has, and is told."""
        found = {}
        for posterior in self._service.registry.posteriors:
            now, hash = look(posterior), posterior.hash
            settled = now == self._last.get(hash)
            self._last[hash] = now
            if not settled or now == self._read.setdefault(hash, now):
                continue
            self._read[hash] = now
            try:
                found[hash] = artefact.calibrated_again(posterior)
            except (PosteriorError, OSError) as error:
                say(f"warning: {posterior.name} keeps the calibration that it had: {error}")
            else:
                count = len(found[hash].calibration) + len(found[hash].texts)
                say(f"the calibration of {posterior.name} was read again: {count} record{'' if count == 1 else 's'}")
        return found


def looks(registry: Registry) -> dict[str, Look]:
    """What the folders of its posteriors look like now, by their hashes."""
    return {each.hash: look(each) for each in registry.posteriors}


def look(posterior: Posterior) -> Look:
    """What can be seen of the calibrations of a posterior without reading them."""
    try:
        files = [(path.name, path.stat()) for path in (posterior.path / FOLDER).iterdir() if path.suffix in SUFFIXES]
    except OSError:  # there is none, or a file went while it was looked at
        return frozenset()
    return frozenset((name, each.st_mtime_ns, each.st_size, each.st_ino) for name, each in files)


SUFFIXES = (".json", ".safetensors")
