"""One thread that writes: answers when there is time, reports before they are acknowledged, all in the order in which
they came. So whoever has a reply can report on it at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from server.errors import Unavailable
from server.metrics import Metrics
from server.store import database, work
from server.store.values import Reply, Report, Reporter, Result

logger = logging.getLogger("posterior.server")

MAX_WAITING = 2**20  # values of all that waits to be written: some tens of MB
TOGETHER = 64  # jobs of one transaction
DAY = 86400.0  # seconds
EXPIRE_SECONDS = 3600.0  # between looks for answers whose time is over
ANSWER_SECONDS = 20.0  # until a report is given up: longer than the database's own limits
CLOSE_SECONDS = 10.0

T = TypeVar("T")


@dataclass
class _Job:
    """Work in the database. answers: how many it keeps, which nobody waits for; size: about how many values."""

    work: Callable[[Connection], Any]
    answers: int = 0
    size: int = 0
    done: Future[Any] = field(default_factory=Future)


class Store:
    """Answers and their outcomes in a database.

    requests: whether the bodies of requests are kept too; days: how long answers without an outcome are; share: of the
    answers whose label is asked for; changed: is called when outcomes have been stored or deleted.
    """

    def __init__(
        self, url: str, metrics: Metrics, *, days: float = 30.0, requests: bool = False, share: float = 0.0
    ) -> None:
        """Opens the database, and brings its schema up to date. Raises PosteriorError."""
        self.url = database.read_url(url)
        self.requests = requests
        self._engine = database.connect(self.url)
        self._metrics = metrics
        self._days = days
        self._share = share
        self.changed: Callable[[], None] = lambda: None
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._waiting = 0
        self._closed = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="outcomes", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The database's URL without its password."""
        return self.url.render_as_string(hide_password=True)

    def asks(self) -> bool:
        """Whether the label of an answer is to be asked for. Nothing but chance decides: not who asks, nor what."""
        return self._share > 0 and random.random() < self._share

    def keep(self, reply: Reply) -> None:
        """Has a reply stored soon. One that cannot be is counted, and an outcome of it will be unknown."""
        job = _Job(partial(work.keep, reply=reply), answers=len(reply.answers), size=reply.size)
        if not work.storable(reply.id):
            self._drop(job, "the id of the reply is too long, or holds what cannot be printed")
        elif not self._add(job):
            self._drop(job, "too many others wait to be written")

    async def report(self, reporter: Reporter, reports: Sequence[Report]) -> list[Result]:
        """What became of each report; those that are stored will survive whatever ends this process or machine.

        Raises Unavailable. A report may be stored all the same then, and can be sent again.
        """
        job = _Job(partial(work.report, reporter=reporter, reports=reports), size=8 * len(reports))
        results: list[Result] = await self._done(job)
        for each in results:
            self._metrics.outcomes.labels(each.posterior or "none", each.status).inc()
        if any(each.status == "stored" for each in results):
            self.changed()
        return results

    async def forget(self, reporter: Reporter, id: str) -> bool:
        """Deletes a reply with its answers and their outcomes; whether there was one. Raises Unavailable."""
        found: bool = await self._done(_Job(partial(work.forget, reporter=reporter, id=id)))
        if found:
            self.changed()
        return found

    def read(self, work: Callable[[Connection], T]) -> Future[T]:
        """What `work` finds in the database, after all that was to be written before."""
        job = _Job(work)
        if not self._add(job):
            job.done.set_exception(Unavailable("the server is stopping, or its database of outcomes is too slow"))
        return job.done

    def close(self) -> None:
        """Writes what waits, as far as that is quick, and closes the database."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        if lost := sum(job.answers for job in self._jobs):
            self._warn(f"{lost} answers could not be kept before the end")
        self._engine.dispose()

    async def _done(self, job: _Job) -> Any:
        """The job's result, once it is on the disk. Raises Unavailable."""
        if not self._add(job):
            raise Unavailable("the server is stopping, or its database of outcomes is too slow; try again shortly")
        try:
            return await asyncio.wait_for(asyncio.wrap_future(job.done), ANSWER_SECONDS)
        except (SQLAlchemyError, OSError) as error:  # a TimeoutError among them
            raise Unavailable("the database of outcomes cannot be reached now; try again shortly") from error

    def _add(self, job: _Job) -> bool:
        """Puts a job at the end of the queue, if there is room."""
        with self._changed:
            if self._closed or self._waiting + job.size > MAX_WAITING:
                return False
            self._waiting += job.size
            self._jobs.append(job)
            self._changed.notify()
        return True

    def _run(self) -> None:
        """The thread: until the store is closed and nothing waits."""
        expire_at = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed, max(0.0, expire_at - time.monotonic()))
                jobs = [self._jobs.popleft() for _ in range(min(TOGETHER, len(self._jobs)))]
                self._waiting -= sum(job.size for job in jobs)
                if self._closed and not jobs:
                    return
            if jobs := [job for job in jobs if job.done.set_running_or_notify_cancel()]:
                self._settle(jobs)
            if time.monotonic() >= expire_at:
                expire = _Job(partial(work.expire, before=time.time() - DAY * self._days))
                self._settle([expire])
                more = expire.done.exception() is None and expire.done.result() == work.EXPIRED_TOGETHER
                expire_at = time.monotonic() + (0.0 if more else EXPIRE_SECONDS)

    def _settle(self, jobs: Sequence[_Job], *, again: bool = True) -> None:
        """Does the jobs in one transaction. One that the database refuses for its values, or because another server
        was faster, must not fail the others: each is done once more by itself."""
        try:
            with self._engine.begin() as connection:
                results = [job.work(connection) for job in jobs]
        except (IntegrityError, DataError) as error:
            if again:
                for job in jobs:
                    self._settle([job], again=False)
            else:
                self._fail(jobs, error)
        except Exception as error:  # the thread must live on
            self._fail(jobs, error)
        else:
            self._failing = False
            for job, result in zip(jobs, results, strict=True):
                job.done.set_result(result)

    def _fail(self, jobs: Sequence[_Job], error: Exception) -> None:
        self._warn(f"the database {self.name} fails: {database.reason(error)}")
        for job in jobs:
            self._metrics.answers_dropped.inc(job.answers)
            job.done.set_exception(error)

    def _drop(self, job: _Job, why: str) -> None:
        self._warn(f"answers are not kept: {why}")
        self._metrics.answers_dropped.inc(job.answers)

    def _warn(self, line: str) -> None:
        """Says it once, until the database has worked again."""
        if not self._failing:
            self._failing = True
            logger.warning("%s. Outcomes of answers that are not kept will be unknown", line)
