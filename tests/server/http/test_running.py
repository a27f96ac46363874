"""Requests that run: counted, and ended with an error where that is wanted."""

from __future__ import annotations

import asyncio
import time

import pytest

from server.errors import Busy, Stopping
from server.http.running import Running

pytestmark = pytest.mark.asyncio


async def test_ended_waits_for_the_last_one() -> None:
    running = Running(9)
    assert await running.ended(0)
    with running.counted():
        start = time.monotonic()
        assert not await running.ended(0.05) and time.monotonic() - start >= 0.04
        with running.counted():
            pass
        assert not await running.ended(0)
    assert await running.ended(0)


async def test_abort_ends_what_works_and_what_comes_later() -> None:
    running = Running(9)

    async def work() -> None:
        async with running.work():
            await asyncio.sleep(60)

    tasks = [asyncio.create_task(work()) for _ in range(3)]
    await asyncio.sleep(0.01)
    running.abort()
    running.abort()
    start = time.monotonic()
    assert [type(error) for error in await asyncio.gather(*tasks, return_exceptions=True)] == [Stopping] * 3
    with pytest.raises(Stopping):
        await work()
    assert time.monotonic() - start < 5 and not running._work


async def test_other_errors_pass_and_a_time_out_of_the_work_is_its_own() -> None:
    running = Running(9)
    for error in (TimeoutError, ValueError, asyncio.CancelledError):
        with pytest.raises(error):
            async with running.work():
                raise error
    assert not running._work


async def test_admit_counts_work() -> None:
    running = Running(1)
    running.admit()
    async with running.work():
        with pytest.raises(Busy, match="1 requests are being answered"):
            running.admit()
    running.admit()
