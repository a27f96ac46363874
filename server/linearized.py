"""The linearised predictive in a process of its own, so that neither the event loop nor vLLM waits for it.

Prompts that arrive while a batch runs form the next one. A worker that dies fails its batch with a 503 and is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posterior import artefact
from posterior.base import Base
from posterior.candidates import Candidates
from posterior.linearized import LinearizedModel, dtype_on
from server.errors import unavailable
from server.metrics import Metrics

MAX_BATCH = 32  # prompts
MAX_WAITING = 4096  # prompts; a queue without bound would only grow older
THREADS = 2  # of torch, on the CPU

Moments = tuple[
    np.ndarray, np.ndarray
]  # mean [C], covariance [C, C]; arrays, because tensors would travel in shared memory

_model: LinearizedModel | None = None  # of a worker process; None in the server's own


def _load(base: Base, folders: Mapping[str, Path], device: str) -> None:
    """In the worker: hold the base and the posteriors until the server goes away."""
    global _model
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    _model = LinearizedModel(
        base,
        {name: artefact.load(path) for name, path in folders.items()},
        dtype=getattr(torch, dtype_on(device)),
        device=device,
    )


def _follow(parent: Any) -> None:
    """End with the server, even if it was killed: an orphan would hold the base in memory for ever."""
    parent.join()
    os._exit(1)


def _moments(name: str, prompts: list[tuple[int, ...]], candidates: list[Candidates]) -> list[Moments]:
    """In the worker: one batch."""
    if _model is None:
        raise RuntimeError("the worker has no model")
    return [(mean.numpy(), covariance.numpy()) for mean, covariance in _model.logits(name, prompts, candidates)]


@dataclass(frozen=True)
class _Item:
    name: str
    prompt: tuple[int, ...]
    candidates: Candidates
    result: asyncio.Future[Moments]
    since: float


class Linearizer:
    """The server's end of the worker process."""

    def __init__(self, base: Base, folders: Mapping[str, Path], device: str, metrics: Metrics) -> None:
        self.dtype = dtype_on(device)
        self._parts = (base, dict(folders), device)
        self._metrics = metrics
        self._waiting: list[_Item] = []
        self._drain: asyncio.Task[None] | None = None
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
        self._loaded = pool.submit(_load, *self._parts)
        return pool

    async def start(self) -> None:
        """Wait until the worker holds its model; raises what kept it from loading."""
        await asyncio.wrap_future(self._loaded)

    async def moments(
        self, name: str, prompts: Sequence[Sequence[int]], candidates: Candidates
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Mean [C] and covariance [C, C], float64, of the candidates' scores for each prompt. Raises ApiError 503."""
        loop = asyncio.get_running_loop()
        self._waiting = [item for item in self._waiting if not item.result.done()]
        if len(self._waiting) + len(prompts) > MAX_WAITING:
            raise unavailable(
                f"{len(self._waiting)} prompts already wait for the linearised predictive; try again later"
            )
        items = [_Item(name, tuple(prompt), candidates, loop.create_future(), time.monotonic()) for prompt in prompts]
        self._waiting.extend(items)
        if self._drain is None or self._drain.done():
            self._drain = loop.create_task(self._run())
        results = await asyncio.gather(*(item.result for item in items))
        return [(torch.from_numpy(mean), torch.from_numpy(covariance)) for mean, covariance in results]

    async def _run(self) -> None:
        while batch := self._next_batch():
            now = time.monotonic()
            self._metrics.batch_size.observe(len(batch))
            for item in batch:
                self._metrics.queue.observe(now - item.since)
            try:
                results = await self._submit(batch)
            except Exception as error:
                logging.getLogger("posterior.server").error("linearised batch failed", exc_info=error)
                failure = error
                if isinstance(error, BrokenProcessPool):
                    self._pool.shutdown(wait=False)
                    self._pool = self._new_pool()
                    failure = unavailable(
                        "the linearised predictive was interrupted and is starting again; try again shortly"
                    )
                for item in batch:
                    if not item.result.done():
                        item.result.set_exception(failure)
            else:
                for item, moments in zip(batch, results, strict=True):
                    if not item.result.done():  # its client may have left
                        item.result.set_result(moments)

    async def _submit(self, batch: list[_Item]) -> list[Moments]:
        loop = asyncio.get_running_loop()
        prompts, candidates = [item.prompt for item in batch], [item.candidates for item in batch]
        return await loop.run_in_executor(self._pool, _moments, batch[0].name, prompts, candidates)

    def _next_batch(self) -> list[_Item]:
        """The oldest waiting prompts of one posterior, at most MAX_BATCH; those whose client has left are dropped."""
        self._waiting = [item for item in self._waiting if not item.result.done()]
        batch = [item for item in self._waiting if item.name == self._waiting[0].name][:MAX_BATCH]
        taken = set(map(id, batch))
        self._waiting = [item for item in self._waiting if id(item) not in taken]
        return batch

    def stop(self) -> None:
        """End the worker, whatever it is doing."""
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
