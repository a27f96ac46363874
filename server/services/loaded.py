"""Posteriors that the engine holds: what they take of its room, and what their self-test found."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from posterior.models import lora, servable
from server.engine import Adapter, Room
from server.engine.config import lora_targets
from server.errors import Conflict
from server.services.probing import Verdict
from server.services.registry import Served, Version, adapters_of

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of a number
RESTART = "restart the server with the folder in place: it then makes room for it"


@dataclass
class Loaded:
    """One posterior. bytes: of one adapter in the engine's memory; since: seconds since 1970."""

    version: Version
    bytes: int
    verdict: Verdict = field(default_factory=Verdict)
    state: Literal["loaded", "draining"] = "loaded"
    since: float = field(default_factory=time.time)

    @property
    def mixture(self) -> Served:
        """The model that mixes its particles."""
        return self.version[0]

    @property
    def label(self) -> str:
        """name@hash"""
        return self.mixture.key

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """theta* and the particles."""
        return adapters_of(self.mixture)

    @property
    def public(self) -> dict[str, Adapter]:
        """What generates text with one adapter, by the engine's name of it."""
        return {each.key: each.map for each in self.version if each.map is not None}

    @property
    def arithmetic(self) -> str:
        """What it takes of the engine's memory, in words."""
        n = len(self.adapters)
        return f"{n} adapters x {self.bytes / 1e6:.3g} MB = {n * self.bytes / 1e6:.3g} MB"


def loaded(version: Version, dtype: str) -> Loaded:
    """A version that an engine of this dtype holds."""
    mixture = version[0]
    numbers = 0 if mixture.posterior is None else lora.size(mixture.posterior.map_dir)
    return Loaded(version, numbers * BYTES.get(dtype, 4))


def check_room(one: Loaded, room: Room, others: Iterable[Loaded]) -> None:
    """Raises Conflict for a posterior that the engine was not started for, or that has no place beside the others."""
    mixture, posterior = one.mixture, one.mixture.posterior
    if posterior is None:
        return
    rank = servable.rank(lora.read_config(posterior.map_dir))
    if rank > room.rank:
        raise Conflict(f"{one.label} has rank {rank}, and this engine was started for {room.rank}; {RESTART}")
    foreign = set(lora_targets(lora.modules(posterior.map_dir))) - set(room.targets or ())
    if room.targets is not None and foreign:
        raise Conflict(
            f"{one.label} adapts {', '.join(sorted(foreign))}, and this engine was started for "
            f"{', '.join(room.targets)}; {RESTART}"
        )
    if len(mixture.particles) > room.slots - 1:
        raise Conflict(
            f"{one.label} has {len(mixture.particles)} particles, and this engine was started for {room.slots - 1} in "
            f"a batch; {RESTART}"
        )
    taken, needed = sum(len(each.adapters) for each in others), len(one.adapters)
    if taken + needed > room.places:
        raise Conflict(
            f"{one.label} needs {one.arithmetic}, and {taken} of {room.places} places for adapters are taken; unload "
            "another posterior, or restart the server with a larger --hot-load-gib"
        )


def places(adapters: int, largest: int, gib: float) -> int:
    """How many adapters there is memory for: those at the start, and as many of the largest, of this many numbers, as
    fit into `gib` in float32."""
    return adapters + math.floor(gib * 2**30 / (4 * largest))
