"""The linearised predictive in a process of its own, so that neither the event loop nor vLLM waits for it.

Prompts that arrive while a batch runs form the next one. A prompt that needs more memory than there is for it is
refused. Should the worker die all the same, its batch fails with a 503, what asks meanwhile too, and another worker is
loaded. A prompt of a batch that ended a worker runs alone the next time; one that ended two is refused for a while. A
posterior that cannot be read again by then is left out, until a worker is loaded once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass

import torch

from posterior.data.candidates import Candidates
from posterior.data.examples import Example
from posterior.laplace.linearized import dtype_on
from posterior.likelihood.footprint import Footprint
from posterior.models.base import Base
from server import tracing
from server.errors import Busy, PromptRefused, RequestError, Unavailable
from server.metrics import Metrics
from server.workers import inside, memory
from server.workers.inside import Folder, Loaded, Moments
from server.workers.process import Interrupted, Worker
from server.workers.suspects import FORGIVEN_SECONDS, STRIKES, Prompt, Suspects

MAX_BATCH = 32  # prompts
MAX_WAITING = 4096  # prompts; a queue without bound would only grow older
SHARE = 0.5  # of the memory that is free once everything is loaded; the rest is for vLLM's requests and other programs

logger = logging.getLogger("posterior.server")


@dataclass(frozen=True)
class _Item:
    name: str
    prompt: tuple[int, ...]
    candidates: Candidates
    result: asyncio.Future[Moments]
    since: float

    @property
    def key(self) -> Prompt:
        return self.name, self.prompt, self.candidates


class Linearizer:
    """The server's end of the worker process."""

    def __init__(
        self, base: Base, folders: Mapping[str, Folder], device: str, metrics: Metrics, promised: float = 0.0
    ) -> None:
        """promised: the share of this GPU that vLLM will take, if it has not started yet."""
        self.dtype = dtype_on(device)
        self._base, self._folders = base, dict(folders)
        self._metrics = metrics
        self._device, self._promised = device, promised
        self._waiting: list[_Item] = []
        self._suspects = Suspects()
        self._drain: asyncio.Task[None] | None = None
        self._footprints: dict[str, Footprint] = {}
        self._refused: dict[str, str] = {}
        self._room = 0.0
        self._worker = Worker(
            "the linearised predictive",
            "ask for the predictive 'mixture'",
            inside.load,
            self._parts(),
            loaded=self._loaded,
            lost=metrics.restarts.inc,
        )

    async def start(self) -> None:
        """Wait until the worker holds its models, and keep one from then on; raises what kept it from loading."""
        await self._worker.start()

    async def _loaded(self, found: Loaded) -> None:
        """What the worker holds, and how much memory it may take."""
        self._footprints, self._refused = found
        self._metrics.unreadable.set(len(self._refused))
        for name, why in self._refused.items():
            logger.error("the linearised predictive is without %s: %s", name, why)
        self._room = SHARE * await self._worker.run(memory.free, self._device, self._promised)
        self._promised = 0.0  # another worker finds vLLM in place
        if self._device != "cpu":
            await self._worker.run(inside.limit, self._device, self._room)

    def _parts(self) -> tuple[Base, dict[str, Folder], str]:
        """What a worker is loaded with."""
        return self._base, dict(self._folders), self._device

    async def load(self, name: str, folder: Folder) -> None:
        """Hold one more posterior, from now on. Raises PosteriorError, and Unavailable while there is no worker."""
        self.check()
        footprint = await self._worker.run(inside.add, name, folder)
        self._folders[name], self._footprints[name] = folder, footprint
        self._refused.pop(name, None)
        self._metrics.unreadable.set(len(self._refused))
        self._worker.parts = self._parts()

    async def unload(self, name: str) -> None:
        """Forget a posterior, which nobody asks for any more."""
        self._folders.pop(name, None)
        self._footprints.pop(name, None)
        self._refused.pop(name, None)
        self._metrics.unreadable.set(len(self._refused))
        self._worker.parts = self._parts()
        with contextlib.suppress(Unavailable):  # one that is loaded from now on does not hold it
            self.check()
            await self._worker.run(inside.remove, name)

    def check(self) -> None:
        """Raises Unavailable while no worker holds the models."""
        self._worker.check()

    async def moments(
        self, name: str, prompts: Sequence[Sequence[int]], candidates: Candidates
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Mean [C] and covariance [C, C], float64, of the candidates' scores for each prompt.

        Raises:
            PromptRefused: there is not enough memory for a prompt.
            Unavailable: there is no worker, or it could not read this posterior. Busy: too many prompts wait.
        """
        self.check()
        if name in self._refused:
            raise Unavailable(
                f"the linearised predictive of {name!r} could not be loaded; the server's log says why: ask for the "
                "predictive 'mixture'"
            )
        for index, prompt in enumerate(prompts):
            self._check_prompt(name, index, tuple(prompt), candidates)
        loop = asyncio.get_running_loop()
        self._waiting = [item for item in self._waiting if not item.result.done()]
        if len(self._waiting) + len(prompts) > MAX_WAITING:
            raise Busy(f"{len(self._waiting)} prompts already wait for the linearised predictive; try again later")
        items = [_Item(name, tuple(prompt), candidates, loop.create_future(), time.monotonic()) for prompt in prompts]
        self._waiting.extend(items)
        if self._drain is None or self._drain.done():
            self._drain = loop.create_task(self._run(), context=Context())  # no single request's
        with tracing.span("linearized", prompts=len(prompts)):
            results = await asyncio.gather(*(item.result for item in items))
        return [(torch.from_numpy(mean), torch.from_numpy(covariance)) for mean, covariance in results]

    def _check_prompt(self, name: str, index: int, prompt: tuple[int, ...], candidates: Candidates) -> None:
        footprint = self._footprints[name]
        wanted = footprint.bytes(Example(prompt, candidates, 0))
        if wanted > self._room:
            longest = footprint.longest(candidates, self._room)
            raise PromptRefused(
                index,
                f"has {len(prompt)} tokens: the linearised predictive of its {len(candidates)} answers "
                f"takes {wanted / 1e9:.1f} GB, and {self._room / 1e9:.1f} GB are free for it: "
                + (f"send at most {longest} tokens, or " if longest else "give fewer answers, or ")
                + "ask for the predictive 'mixture'",
            )
        if self._suspects.strikes((name, prompt, candidates)) >= STRIKES:
            raise PromptRefused(
                index,
                f"has ended the linearised predictive's worker {STRIKES} times, most likely for lack of memory, and is "
                f"not tried again for {FORGIVEN_SECONDS / 60:.0f} minutes: send fewer tokens or answers, or ask for "
                "the predictive 'mixture'",
            )

    async def _run(self) -> None:
        while batch := self._next_batch():
            now = time.monotonic()
            self._metrics.batch_size.observe(len(batch))
            for item in batch:
                self._metrics.queue.observe(now - item.since)
            try:
                self.check()
                results = await self._submit(batch)
            except Exception as error:
                self._fail(batch, error)
            else:
                self._suspects.acquit(item.key for item in batch)
                for item, moments in zip(batch, results, strict=True):
                    if not item.result.done():  # its client may have left
                        item.result.set_result(moments)

    def _fail(self, batch: list[_Item], error: Exception) -> None:
        """Tell those who wait. They may try again; nothing is tried again here."""
        if not isinstance(error, RequestError):
            logger.error("linearised batch failed", exc_info=error)
        if isinstance(error, Interrupted):
            self._suspects.blame(item.key for item in batch)
        elif isinstance(error, MemoryError):
            error = Unavailable("there is no memory for the linearised predictive now; try again later, or 'mixture'")
        for item in batch:
            if not item.result.done():
                item.result.set_exception(error)

    async def _submit(self, batch: list[_Item]) -> list[Moments]:
        """What the worker computes of a batch."""
        prompts, candidates = [item.prompt for item in batch], [item.candidates for item in batch]
        return await self._worker.run(inside.moments, batch[0].name, prompts, candidates, self._room)

    def _next_batch(self) -> list[_Item]:
        """The oldest waiting prompts of one posterior, at most MAX_BATCH, or one suspect alone; those whose client has
        left are dropped."""
        self._waiting = [item for item in self._waiting if not item.result.done()]
        batch: list[_Item] = []
        for item in self._waiting:
            alone = self._suspects.strikes(item.key) > 0
            if not batch or (item.name == batch[0].name and not alone and len(batch) < MAX_BATCH):
                batch.append(item)
            if alone and item is batch[0]:
                break
        taken = set(map(id, batch))
        self._waiting = [item for item in self._waiting if id(item) not in taken]
        return batch

    def stop(self) -> None:
        """End the worker, whatever it is doing."""
        self._worker.stop()
