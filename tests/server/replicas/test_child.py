"""A server as a child process: how it starts, answers, breaks off and ends. A stand-in takes the place of the real one;
tests/replicas/run_ray.py has that."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server.replicas import child as module
from server.replicas.child import Child
from server.replicas.messages import Forwarded, ReplicaLost

pytestmark = pytest.mark.asyncio
STANDIN = [sys.executable, str(Path(__file__).parent / "standin.py")]
PARENT = """
import asyncio, sys
from server.replicas.child import Child
async def main():
    await Child.start("a", sys.argv[1:3], sys.argv[3:])
    print("ready", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@asynccontextmanager
async def started(*options: str) -> AsyncIterator[Child]:
    child = await Child.start("a", STANDIN, options)
    try:
        yield child
    finally:
        await child.stop()


def post(target: str) -> Forwarded:
    return Forwarded("POST", target, (("authorization", "Bearer k\u00e9y"), ("x-a", "1")), b'{"x": 1}')


async def test_a_request_reaches_the_server_as_it_is() -> None:
    async with started() as child:
        assert await child.ready() and await child.healthy()
        whole = await child.ask(post("/v1/a%2Fb?c=%20d"))
    assert (whole.head.replica, whole.head.status) == ("a", 201)
    assert [value for name, value in whole.head.headers if name == "x-twice"] == ["1", "2"]
    line, _, rest = whole.body.partition(b" ")
    assert line == b"/v1/a%2Fb?c=%20d" and rest.endswith(b'\n\n{"x": 1}')
    assert "Bearer k\u00e9y".encode() in rest and b"x-a: 1" in rest
    assert b"User-Agent" not in rest and b"Accept" not in rest, "nothing of our client's own"


async def test_it_is_started_when_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    before = time.monotonic()
    async with started("--loads", "0.5"):
        assert time.monotonic() - before >= 0.5


async def test_one_that_does_not_start_is_an_error_with_its_status() -> None:
    with pytest.raises(RuntimeError, match="status 3 before it was ready"):
        await Child.start("a", STANDIN, ["--ends", "3"])


@pytest.mark.parametrize("target", ["/crash", "/half"])
async def test_one_that_dies_at_work_is_lost(target: str) -> None:
    async with started() as child:
        with pytest.raises(ReplicaLost) as error:
            [part async for part in child.send(post(target))]
        assert error.value.replica == "a"
        assert await asyncio.wait_for(child.wait(), 5) == 9
        assert not await child.healthy()
        with pytest.raises(ReplicaLost):
            await child.ask(post("/v1"))


async def test_one_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    async with started("--deaf", "1") as child:
        pass
    assert await child.wait() == -signal.SIGKILL


async def test_one_that_ends_in_time_is_not_killed() -> None:
    async with started() as child:
        pass
    assert await child.wait() == 0


async def test_it_does_not_outlive_who_started_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    command = [sys.executable, "-c", PARENT, *STANDIN, "--pid", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        pid = int(file.read_text())
        parent.kill()
    deadline = time.monotonic() + 5
    while alive(pid):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
