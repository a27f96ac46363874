"""The requests that are being answered, for who stops the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from server.errors import Busy, Stopping


class Running:
    """Counts them, and ends them when it is told to. stopping: whether new ones are refused."""

    def __init__(self, most: int) -> None:
        self.stopping = False
        self._most = most
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()
        self._work: set[asyncio.Timeout] = set()
        self._aborted = False

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request of any kind, up to its last byte."""
        self._count += 1
        self._none.clear()
        try:
            yield
        finally:
            self._count -= 1
            if self._count == 0:
                self._none.set()

    def admit(self) -> None:
        """Raises Busy where as many requests for answers run as may."""
        if len(self._work) >= self._most:
            raise Busy(f"{len(self._work)} requests are being answered, the most at a time; try again shortly")

    @contextlib.asynccontextmanager
    async def work(self) -> AsyncIterator[None]:
        """A block that makes an answer. Raises Stopping in it when the server gives up on what runs."""
        if self._aborted:
            raise Stopping
        try:
            async with asyncio.timeout(None) as limit:
                self._work.add(limit)
                try:
                    yield
                finally:
                    self._work.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            raise Stopping from None

    async def ended(self, seconds: float) -> bool:
        """Whether the last one ends within this time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._none.wait(), seconds)
        return self._none.is_set()

    def abort(self) -> None:
        """End all work, with an error for each client."""
        if self._aborted:
            return
        self._aborted = True
        for limit in self._work:
            limit.reschedule(asyncio.get_running_loop().time())
