"""An ordinary `posterior serve` as a process of its own, and the way to it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncGenerator, Sequence
from typing import Self

import aiohttp
from yarl import URL

from server.replicas.messages import Forwarded, Head, ReplicaLost, Whole

POLL_SECONDS = 0.5
GRACE_SECONDS = 45.0  # for the server to end after SIGTERM: more than it drains
AUTOMATIC = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")  # what aiohttp would add


class Child:
    """A running server, known to others as `name`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, port: int) -> None:
        self._name = name
        self._process = process
        self._address = f"http://127.0.0.1:{port}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            auto_decompress=False,
            skip_auto_headers=AUTOMATIC,
        )

    @classmethod
    async def start(cls, name: str, command: Sequence[str], options: Sequence[str]) -> Self:
        """A server that is ready. The kernel ends it if this process is gone, however it went.

        Raises RuntimeError if it ends before it is ready.
        """
        port = _free_port()
        own = ("--host", "127.0.0.1", "--port", str(port))
        process = await asyncio.create_subprocess_exec(
            "setpriv", "--pdeathsig", "KILL", *command, "serve", *options, *own
        )
        child = cls(name, process, port)
        try:
            while not await child.ready():
                if process.returncode is not None:
                    raise RuntimeError(
                        f"`posterior serve` ended with status {process.returncode} before it was ready; "
                        "its lines above say why"
                    )
                await asyncio.sleep(POLL_SECONDS)
        except BaseException:
            await child.stop()
            raise
        return child

    async def ready(self) -> bool:
        """Whether it answers every request."""
        return await self._says_yes("/ready")

    async def healthy(self) -> bool:
        """Whether it and its engine live."""
        return await self._says_yes("/health")

    async def _says_yes(self, path: str) -> bool:
        try:
            async with self._session.get(self._address + path, timeout=aiohttp.ClientTimeout(total=5)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def send(self, request: Forwarded) -> AsyncGenerator[Head | bytes]:
        """Its answer: the head, then the body in parts, as they come. Raises ReplicaLost."""
        url = URL(self._address + request.target, encoded=True)
        try:
            async with self._session.request(
                request.method, url, headers=request.headers, data=request.body or None, allow_redirects=False
            ) as response:
                headers = tuple((name.lower(), value) for name, value in response.headers.items())
                yield Head(self._name, response.status, headers)
                async for part in response.content.iter_any():
                    yield part
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ReplicaLost(self._name) from error

    async def ask(self, request: Forwarded) -> Whole:
        """Its whole answer. Raises ReplicaLost."""
        parts = [part async for part in self.send(request)]
        head = parts[0]
        assert isinstance(head, Head)
        return Whole(head, b"".join(part for part in parts if isinstance(part, bytes)))

    async def wait(self) -> int:
        """Its status, when it has ended."""
        return await self._process.wait()

    async def stop(self) -> None:
        """Let it finish what it does, and end."""
        await self._session.close()
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), GRACE_SECONDS)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
