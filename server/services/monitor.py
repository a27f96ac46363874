"""What is learnt from outcomes, kept up to date beside the requests: computed by a thread of its own at the start,
after outcomes have come, and every minute, since answers come without them, and other servers may use the database.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from prometheus_client.core import GaugeMetricFamily, Metric

from posterior.errors import first_line
from posterior.models.devices import Dtype
from posterior.storage.artefact import Posterior
from server.configuration.window import Window
from server.errors import Unavailable
from server.services.gauges import gauges
from server.services.learning import Learnt, learnt
from server.store.reading import Newest, newest
from server.store.store import Store

if TYPE_CHECKING:
    from server.services.predictive import Service

logger = logging.getLogger("posterior.server")

EVERY_SECONDS = 60.0
APART_SECONDS = 5.0  # between the end of one computation and the next
READ_SECONDS = 30.0

Found = Sequence[tuple[Posterior, Learnt]]


@dataclass(frozen=True)
class Snapshot:
    """What was learnt last, and when (Unix time; 0: never)."""

    found: Found = ()
    at: float = 0.0


class Monitor:
    """Learns from the store of a service, and shows it as gauges."""

    def __init__(self, service: Service, store: Store, window: Window) -> None:
        self.window = window
        self._service, self._store = service, store
        self._snapshot, self._failing = Snapshot(), False
        self._wake, self._closed = threading.Event(), threading.Event()
        self._one = asyncio.Lock()  # report at a time
        self._thread = threading.Thread(target=self._run, name="learning", daemon=True)
        store.changed = self._wake.set
        service.metrics.registry.register(cast(Any, self))

    def start(self) -> None:
        """Learns from now on."""
        self._thread.start()

    def close(self) -> None:
        """Stops. The store is closed after it."""
        self._closed.set()
        self._wake.set()
        self._thread.join(READ_SECONDS)

    def learn(self) -> None:
        """Computes everything once. What is shown stays as it was if the database fails."""
        try:
            found = self._learnt(self._service.registry.posteriors)
        except Exception as error:  # the thread must live on
            if not self._failing:
                logger.warning("what outcomes say is not up to date: %s", first_line(error))
            self._failing = True
        else:
            self._failing = False
            self._snapshot = Snapshot(found, time.time())

    async def report(self, posteriors: Sequence[Posterior], owner: str | None) -> Found:
        """What outcomes say now of the answers of these posteriors, of all keys or of one owner. Raises Unavailable."""
        async with self._one:
            try:
                return await asyncio.to_thread(self._learnt, posteriors, owner)
            except Exception as error:  # SQLAlchemy's many, and a TimeoutError
                raise Unavailable("the database of outcomes cannot be read now; try again shortly") from error

    def collect(self) -> Iterator[Metric]:
        """The gauges, for prometheus_client."""
        snapshot = self._snapshot
        about = "When what outcomes say was computed last."
        yield GaugeMetricFamily("posterior_learning_timestamp_seconds", about, snapshot.at)
        yield from gauges([((posterior.name, each.predictive, each.kind), each) for posterior, each in snapshot.found])

    def _learnt(self, posteriors: Sequence[Posterior], owner: str | None = None) -> Found:
        dtype = cast(Dtype, self._service.engine.dtype)
        found = []
        for posterior in posteriors:
            read = partial(newest, hash=posterior.hash, window=self.window, owner=owner)
            rows: Newest = self._store.read(read).result(READ_SECONDS)
            found += [(posterior, each) for each in learnt(posterior, rows, dtype)]
        return found

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.clear()
            self.learn()
            if not self._closed.wait(APART_SECONDS):
                self._wake.wait(EVERY_SECONDS)
