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
from server.services.predictive import Service
from server.services.warming import warm_up

DRAIN_SECONDS = 30
IDLE_SECONDS = 75  # of a connection; proxies close theirs first (nginx 60, aiohttp 15), else a request may meet the end
WATCH_SECONDS = 0.5  # between looks at the engine


class Server(uvicorn.Server):
    """uvicorn, which would raise a signal again after the drain; the loop's handlers below do not."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def listen(app: FastAPI, listener: socket.socket, service: Service, when_ready: Callable[[], None]) -> None:
    """Answer on `listener`, warm up, call `when_ready`, go on until SIGTERM or Ctrl-C, and finish what has begun.

    Raises PosteriorError when the warm-up fails, or the engine stops.
    """
    config = uvicorn.Config(
        app, log_level="warning", server_header=False, timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )  # fmt: skip
    server = Server(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.handle_exit, number, None)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    warming = asyncio.create_task(warm_up(service))
    await asyncio.wait((serving, warming), return_when=asyncio.FIRST_COMPLETED)
    if warming.done() and not serving.done():
        if (error := warming.exception()) is not None:
            server.should_exit = True
            await serving
            raise PosteriorError(f"the warm-up failed: {first_line(error)}") from error
        for line in warming.result():
            say(f"warning: {line}")
        app.state.ready = True
        service.metrics.ready.set(1)
        when_ready()
    while service.engine.alive() and not serving.done():
        await asyncio.wait((serving,), timeout=WATCH_SECONDS)
    lost = not service.engine.alive() and not server.should_exit  # Ctrl-C may end the engine first
    server.should_exit = True
    await serving  # which answers what waits: a request whose engine is lost gets a 503
    warming.cancel()
    if lost:  # whoever started the server starts it again
        raise PosteriorError("the engine has stopped, and the server with it; the log says why. Start it again")
