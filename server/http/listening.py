"""Requests answered on a socket, from the warm-up to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from posterior.errors import PosteriorError, first_line
from server.console import say
from server.http.place import Place
from server.http.running import Running
from server.services.predictive import Service
from server.services.warming import warm_up

DRAIN_SECONDS = 30.0
LAST_SECONDS = 5  # for errors to reach their clients
IDLE_SECONDS = 75  # of a connection; proxies close theirs first (nginx 60, aiohttp 15), else a request may meet the end
WATCH_SECONDS = 0.5  # between looks at the engine


class Server(uvicorn.Server):
    """uvicorn, which would raise a signal again after the drain; the loop's handlers below do not."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def listen(
    app: FastAPI,
    listener: socket.socket,
    service: Service,
    when_ready: Callable[[], None],
    *,
    place: Place | None = None,
    drain_seconds: float = DRAIN_SECONDS,
) -> None:
    """Answer on `listener`, warm up, call `when_ready`, go on until SIGTERM or Ctrl-C, and finish what has begun.

    From the signal on /ready and new requests get 503. Those that run may go on for `drain_seconds`, or until a second
    signal; then they end with an error. Raises PosteriorError when the warm-up fails, or the engine stops.
    """
    place = place or Place()
    config = uvicorn.Config(
        app, log_config=None, log_level="warning", access_log=False, server_header=False, root_path=place.prefix,
        timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=LAST_SECONDS,
    )  # fmt: skip
    config.load()
    config.ssl = place.tls
    server, running, told = Server(config), app.state.running, asyncio.Event()

    def tell() -> None:
        if told.is_set():
            running.abort()
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, tell)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    warming = asyncio.create_task(warm_up(service))
    stopping = asyncio.create_task(told.wait())
    try:
        await asyncio.wait((serving, warming, stopping), return_when=asyncio.FIRST_COMPLETED)
        if warming.done() and not serving.done():
            if (error := warming.exception()) is not None:
                raise PosteriorError(f"the warm-up failed: {first_line(error)}") from error
            for line in warming.result():
                say(f"warning: {line}")
            app.state.ready = True
            service.metrics.ready.set(1)
            when_ready()
        while service.engine.alive() and not serving.done() and not told.is_set():
            await asyncio.wait((serving, stopping), timeout=WATCH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        lost = not service.engine.alive() and not told.is_set()  # Ctrl-C may end the engine first
        await _drain(running, service, LAST_SECONDS if lost else drain_seconds)
    finally:
        server.should_exit = True
        await serving
        warming.cancel()
        stopping.cancel()
    if lost:  # whoever started the server starts it again
        raise PosteriorError("the engine has stopped, and the server with it; the log says why. Start it again")


async def _drain(running: Running, service: Service, seconds: float) -> None:
    """Let what runs end, then end it: a request whose engine is lost gets a 503 at once."""
    running.stopping = True
    service.metrics.ready.set(0)
    if not await running.ended(seconds):
        say(f"warning: some requests still ran after {seconds:g} s; they end with an error")
        running.abort()
        await running.ended(LAST_SECONDS)
