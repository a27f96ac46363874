"""A process that holds models beside the engine, and another one whenever it is lost.

Neither the event loop nor vLLM waits for it. While it is away, what asks gets a 503.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

from posterior.errors import first_line
from server.errors import Unavailable
from server.workers import child

PAUSE, LONGEST_PAUSE = 0.1, 60.0  # seconds before a lost process is started again; twice as long after each failure

Loaded = TypeVar("Loaded")
Result = TypeVar("Result")

logger = logging.getLogger("posterior.server")


class Interrupted(Unavailable):
    """The process ended while it computed."""


class Worker(Generic[Loaded]):
    """The server's end of a process.

    name: what it computes, as errors call it; otherwise: what to ask for while it is away. parts: what `load` is called
    with in the process. loaded: called here with what that returned; lost: when a process has ended.
    """

    def __init__(
        self,
        name: str,
        otherwise: str,
        load: Callable[..., Loaded],
        parts: tuple[Any, ...],
        *,
        loaded: Callable[[Loaded], Awaitable[None]],
        lost: Callable[[], None],
    ) -> None:
        self.parts = parts
        self.problem: str | None = "is being loaded"
        self._name, self._otherwise = name, otherwise
        self._load, self._loaded, self._lost = load, loaded, lost
        self._keeper: asyncio.Task[None] | None = None
        self.begin()

    def begin(self) -> None:
        """Start a process, which loads."""
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=spawn, initializer=child.belong_to_the_server)
        self._loading: Future[Loaded] = self._pool.submit(self._load, *self.parts)
        (self.process,) = self._pool._processes.values()

    async def start(self) -> None:
        """Wait until the process holds its models, and keep one from then on; raises what kept it from loading. Once
        is enough."""
        if self._keeper is None:
            await self._finish()
            self._keeper = asyncio.create_task(self._keep())

    async def _finish(self) -> None:
        await self._loaded(await asyncio.wrap_future(self._loading))
        self.problem = None

    async def _keep(self) -> None:
        """Start another process whenever one has ended, and try again, less and less often, while that fails."""
        while True:
            await _end(self.process)
            self._lost()
            self.problem, pause = "is starting again", PAUSE
            logger.error("%s's worker ended; another one is being loaded", self._name)
            while self.problem is not None:
                self._pool.shutdown(wait=False)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                self.begin()
                try:
                    await self._finish()
                except Exception as error:
                    self.problem = "cannot be loaded again"
                    logger.error("%s cannot be loaded again: %s", self._name, first_line(error))

    def check(self) -> None:
        """Raises Unavailable while no process holds the models."""
        if self.problem is not None:
            raise Unavailable(f"{self._name} {self.problem}; try again later, or {self._otherwise}")

    async def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What the process computes; one call after the other. Raises Interrupted if it ends meanwhile."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        except BrokenProcessPool as error:
            raise Interrupted(f"{self._name} was interrupted and is starting again; try again shortly") from error

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._keeper is not None and not self._keeper.done():
            self._keeper.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.process.kill()  # it holds nothing that could be half written


async def _end(process: Any) -> None:
    """Wait for the end of a process."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(process.sentinel, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(process.sentinel)
