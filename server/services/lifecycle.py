"""Posteriors are loaded, unloaded and given aliases while the server answers.

One change runs at a time. It ends by putting another registry in the place of the service's, in one step: a request
finds what was served before or after, and keeps what it has found. What was unloaded stays in the engine until its last
request has ended. The engine's names of adapters hold the posterior's hash, and their numbers are never given twice, so
that nothing of one posterior is taken for another's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from posterior.data import base_check
from posterior.errors import PosteriorError
from posterior.storage import record
from posterior.storage.artefact import Posterior
from posterior.storage.destination import NAME
from server.errors import Absent, Conflict, Refused, Unavailable
from server.services import aliases, loaded, probing
from server.services.aliases import Alias
from server.services.loaded import Loaded, check_room
from server.services.predictive import Service
from server.services.probing import Verdict
from server.services.registry import Registry, Source, composed
from server.workers.inside import Folder
from server.workers.linearized import Linearizer

GRACE = 1.0  # seconds after the last request, in which vLLM hears of those that were left

logger = logging.getLogger("posterior.server")


class Lifecycle:
    """What is loaded, and what is done about it. say: takes a line for whoever runs the server."""

    def __init__(
        self,
        service: Service,
        source: Source,
        linearizer: Callable[[Mapping[str, Folder]], Linearizer],
        say: Callable[[str], None] = logger.info,
    ) -> None:
        """linearizer: makes a worker of these posteriors, for a server that started without one.

        Raises PosteriorError for aliases that cannot be read.
        """
        self._service, self._source, self._make, self._say = service, source, linearizer, say
        self._refused = dict(service.registry.refused)
        self._aliases = aliases.read(source.root)
        self._loaded: dict[str, Loaded] = {}
        self._draining: dict[str, Loaded] = {}
        self._drains: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        by_name = service.registry.served
        for entry in [each for each in by_name.values() if each.particles]:
            one = loaded.loaded((entry, by_name[f"{entry.name}/map"]), service.engine.dtype)
            self._loaded[one.label] = one
        self._publish()

    @property
    def loaded(self) -> list[Loaded]:
        """All that the engine holds, also what is being drained."""
        return [*self._loaded.values(), *self._draining.values()]

    @property
    def aliases(self) -> Mapping[str, Alias]:
        """By name."""
        return dict(self._aliases)

    @property
    def registry(self) -> Registry:
        """What is served."""
        return self._service.registry

    def is_loaded(self, label: str | None) -> bool:
        """Whether a posterior is, by its name@hash."""
        return label in self._loaded

    @property
    def room(self) -> str:
        """How much of the engine's memory for adapters is taken, in words."""
        room, taken = self._service.engine.room, sum(len(each.adapters) for each in self.loaded)
        return f"{taken} of {room.places} places for adapters are taken; a batch holds {room.slots}"

    @property
    def arithmetic(self) -> str:
        """What the posteriors take of that memory, in words."""
        each = [f"{one.label} {one.arithmetic}" for one in self.loaded]
        return f"memory for adapters: {'; '.join(each)}; {self.room}"

    async def examine(self) -> list[str]:
        """The self-test of all that was loaded at the start; returns what to say of it. What fails is not served.

        Raises PosteriorError where nothing is left, RequestError where the engine or the worker does not answer.
        """
        async with self._lock:
            lines: list[str] = []
            for label, one in list(self._loaded.items()):
                one.verdict = await probing.examine(self._service, one.mixture)
                lines += one.verdict.notes
                if one.verdict.refusal is not None:
                    del self._loaded[label]
                    self._refused[one.mixture.name] = one.verdict.refusal
                    lines.append(f"{one.mixture.name} is not served: {one.verdict.refusal}")
                    await self._release(one)
            self._publish()
            self.registry.check(self._source.root)
            return lines

    async def load(self, name: str) -> Loaded:
        """The posterior in the folder of this name, from now on served under its own name, unless an alias has that
        name. One that is loaded has its calibrations and probes read again.

        Raises Refused for what is no name, Absent for no such folder, Conflict for one that cannot be served, and
        Unavailable. Nothing has changed then.
        """
        if not NAME.fullmatch(name):
            raise Refused(f"{name!r} is no name of a posterior; give that of a folder, without its hash", "name")
        async with self._lock:
            if not (self._source.root / name / record.NAME).is_file():
                raise Absent(f"the folder of posteriors has no {name!r}; `posterior fit` or a copy puts it there")
            try:
                one = await self._load(name)
            except (PosteriorError, OSError) as error:
                raise Conflict(f"{name!r} cannot be served, and nothing has changed: {error}", "name") from error
            self._loaded.pop(one.label, None)  # the last one of a name has that name
            self._loaded[one.label] = one
            self._refused.pop(name, None)
            self._publish()
            for line in one.verdict.notes:
                self._say(f"warning: {line}")
            self._say(f"loaded {one.label}: {one.arithmetic}; {self.room}")
            return one

    async def _load(self, name: str) -> Loaded:
        """The posterior, which the engine and the worker hold and which has passed its self-test."""
        version = await asyncio.to_thread(self._source.one, name)
        one = loaded.loaded(version, self._service.engine.dtype)
        known = self._loaded.get(one.label) or self._draining.get(one.label)
        if known is not None:
            return await self._again(known, one)
        check_room(one, self._service.engine.room, self.loaded)
        try:
            await self._service.engine.load(one.adapters, one.public)
            await self._linearize(one)
            await self._check_unchanged(one)
            return await self._tested(one)
        except BaseException:
            await self._release(one)
            raise

    async def _again(self, known: Loaded, read: Loaded) -> Loaded:
        """One that the engine holds, with what its folder says now."""
        posterior = read.mixture.posterior
        mixture, point = (replace(each, posterior=posterior) for each in known.version)
        one = await self._tested(replace(known, version=(mixture, point), state="loaded"))
        self._draining.pop(one.label, None)
        return one

    async def _tested(self, one: Loaded) -> Loaded:
        """The posterior with its verdict. Raises Conflict for one that fails its self-test."""
        one.verdict = await probing.examine(self._service, one.mixture)
        if one.verdict.refusal is not None:
            raise Conflict(f"{one.label} is refused: {one.verdict.refusal}", "name")
        posterior = one.mixture.posterior
        if posterior is not None:
            odd = base_check.joints(self._service.tokenizer, posterior.task)
            notes = (*one.verdict.notes, *self._service.unapplied([posterior]), *odd)
            one.verdict = replace(one.verdict, notes=notes)
        return one

    async def _linearize(self, one: Loaded) -> None:
        """Let the worker of the linearised predictive hold it, if it has that predictive."""
        posterior, service = one.mixture.posterior, self._service
        if posterior is None or "linearized" not in one.mixture.predictives:
            return
        folder = (posterior.path, posterior.hash)
        if service.linearizer is not None:
            await service.linearizer.load(one.label, folder)
            return
        made = await asyncio.to_thread(self._make, {one.label: folder})
        try:
            await made.start()
        except BaseException:
            made.stop()
            raise
        service.linearizer = made

    async def _check_unchanged(self, one: Loaded) -> None:
        """Raises Conflict where the folder holds another posterior than was read first."""
        posterior = one.mixture.posterior
        if posterior is None:
            return
        found = await asyncio.to_thread(record.read, posterior.path)
        if found.hash != posterior.hash:
            raise Conflict(f"the folder {posterior.path} was replaced while it was loaded; load it again", "name")

    async def recalibrate(self, posteriors: Mapping[str, Posterior]) -> None:
        """Serve these posteriors, by their hashes, in place of what they were: they were calibrated again."""
        async with self._lock:
            for label, one in self._loaded.items():
                found = None if one.mixture.posterior is None else posteriors.get(one.mixture.posterior.hash)
                if found is not None:
                    mixture, point = (replace(each, posterior=found) for each in one.version)
                    self._loaded[label] = replace(one, version=(mixture, point))
            self._publish()

    async def unload(self, name: str) -> Loaded:
        """Serve a posterior no more, by its name@hash, or by its name where one version is loaded. Requests that have
        begun are answered, and then the engine forgets it.

        Raises Absent, and Conflict where several versions are loaded or an alias leads there.
        """
        async with self._lock:
            one = self._find(name)
            leading = [alias for alias, each in self._aliases.items() if each.posterior == one.label]
            if leading:
                raise Conflict(f"the alias {leading[0]!r} leads to {one.label}; move or delete it first", "name")
            del self._loaded[one.label]
            one.state = "draining"
            self._draining[one.label] = one
            self._publish()
            task = asyncio.create_task(self._drain(one))
            self._drains.add(task)
            task.add_done_callback(self._drains.discard)
            self._say(f"unloaded {one.label}; {one.mixture.users.count} requests go on with it")
            return one

    async def _drain(self, one: Loaded) -> None:
        """Let the engine forget a posterior after its last request, unless it is loaded again."""
        while True:
            await one.mixture.users.none()
            await asyncio.sleep(GRACE)
            async with self._lock:
                if self._draining.get(one.label) is not one:
                    return
                if one.mixture.users.count == 0:
                    await self._release(one)
                    del self._draining[one.label]
                    self._publish()
                    return

    async def _release(self, one: Loaded) -> None:
        """Let the engine and the worker forget it. It does not matter if they have ended."""
        try:
            await self._service.engine.unload(one.adapters, one.public)
            if self._service.linearizer is not None and "linearized" in one.mixture.predictives:
                await self._service.linearizer.unload(one.label)
        except Unavailable as error:
            logger.error("%s could not be unloaded: %s", one.label, error)

    def stop(self) -> None:
        """Wait for no drain any more, and end the worker of the linearised predictive."""
        for task in self._drains:
            task.cancel()
        if self._service.linearizer is not None:
            self._service.linearizer.stop()

    async def point(self, name: str, label: str | None) -> Alias:
        """Let an alias lead to a loaded posterior, by its name@hash, or by its name where one version is loaded; None:
        to the one before.

        Raises Refused, Absent, and Conflict.
        """
        if not NAME.fullmatch(name) or name == self._service.base.id:
            raise Refused(
                f"{name!r} cannot be an alias; use letters, digits, '.', '_' and '-', and not the base's name"
            )
        async with self._lock:
            alias = self._aliases.get(name)
            if label is None and alias is None:
                raise Absent(f"there is no alias {name!r} to roll back")
            target = alias.previous if label is None and alias is not None else label
            if target is None:
                raise Conflict(f"the alias {name!r} has led nowhere else; name a posterior", "posterior")
            try:
                found = self._find(target).label
            except Absent as error:
                raise Conflict(f"{error.message}; load it first", "posterior") from error
            moved = Alias(posterior=found) if alias is None else alias.moved(found)
            await self._keep({**self._aliases, name: moved})
            self._say(f"the alias {name} leads to {found}")
            return moved

    async def unpoint(self, name: str) -> None:
        """Delete an alias. Raises Absent, and Conflict where that cannot be kept."""
        async with self._lock:
            if name not in self._aliases:
                raise Absent(f"there is no alias {name!r}")
            await self._keep({each: alias for each, alias in self._aliases.items() if each != name})
            self._say(f"the alias {name} is gone")

    async def _keep(self, changed: Mapping[str, Alias]) -> None:
        """These aliases from now on, also after a restart. Raises Conflict."""
        try:
            await asyncio.to_thread(aliases.write, self._source.root, changed)
        except PosteriorError as error:
            raise Conflict(f"the aliases stay as they were: {error}") from error
        self._aliases = dict(changed)
        self._publish()

    def _find(self, name: str) -> Loaded:
        """The loaded posterior of this name@hash, or name. Raises Absent, and Conflict for a name of several."""
        found = [one for label, one in self._loaded.items() if name in (label, one.mixture.name)]
        if not found:
            raise Absent(f"no posterior {name!r} is loaded; GET /v1/posteriors lists what is")
        if len(found) > 1:
            labels = ", ".join(one.label for one in found)
            raise Conflict(f"several posteriors {name!r} are loaded; name one of {labels}", "name")
        return found[0]

    def _publish(self) -> None:
        """Serve what is loaded now."""
        versions = [one.version for one in self._loaded.values()]
        leads = {name: alias.posterior for name, alias in self._aliases.items()}
        self._service.registry = composed(self._service.base, versions, leads, self._refused)
        self._describe(self._loaded.values())

    def _describe(self, served: Iterable[Loaded]) -> None:
        """Set the gauges that say what is served."""
        metrics = self._service.metrics
        self.registry.describe(metrics)
        metrics.adapters.set(sum(len(each.adapters) for each in self.loaded))
        metrics.places.set(self._service.engine.room.places)
        metrics.draining.set(len(self._draining))
        for gauge in (metrics.aliases, metrics.probe_difference, metrics.probe_gap, metrics.probe_gap_z):
            gauge.clear()
        for name, alias in self._aliases.items():
            metrics.aliases.labels(name, *alias.posterior.split("@")).set(1)
        for one in served:
            verdict: Verdict = one.verdict
            labels = one.label.split("@")
            for gauge, value in (
                (metrics.probe_difference, verdict.difference),
                (metrics.probe_gap, verdict.gap),
                (metrics.probe_gap_z, verdict.z),
            ):
                if value is not None:
                    gauge.labels(*labels).set(value)
