"""The engine: everything that touches vLLM, and nothing else does. What is private to vLLM is touched in compat/ only.

The rest of the server sees the protocol below; tests put a fake behind it.

A *gang* is one request that K particles decode in lockstep. To vLLM's front end it is one request, its *leader*, who
runs the first particle. The scheduler (compat/scheduler.py) adds K - 1 *siblings* that the front end never sees. The
sampler (compat/mixing.py) mixes the K rows of a step, lets the leader's row draw the token as vLLM always does, and
makes every sibling append it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch

from posterior.data.candidates import Candidates

if TYPE_CHECKING:
    from server.engine.gang import Trace


Kind = Literal["chat", "completion"]  # of OpenAI's requests for text


@dataclass(frozen=True)
class Adapter:
    """A LoRA folder. vLLM keys its prefix cache by `name`, so `name` holds the posterior's content hash."""

    name: str
    path: Path
    number: int  # vLLM's id of the adapter, from 1, unique in the server


@dataclass(frozen=True)
class Room:
    """What the engine was started for, and cannot change: `slots` adapters in a batch, `places` in memory, ranks up to
    `rank`, and layers by the last part of their names (None: any)."""

    slots: int
    places: int
    rank: int
    targets: tuple[str, ...] | None


class Scores(NamedTuple):
    """log_p: log p(candidate | prompt), nats, float64 [prompts, adapters, candidates]. top: the most probable next
    token of each prompt, [prompts, adapters]. cached: how many tokens of each prompt came from the prefix cache under
    every adapter, [prompts]. states: what the LM head reads at each prompt's last token under the first adapter,
    float32 [prompts, hidden size], if they were asked for."""

    log_p: torch.Tensor
    top: torch.Tensor
    cached: list[int]
    states: torch.Tensor | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens a request read and wrote. `cached_tokens`: those read that came from the prefix cache, if it is known."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass
class Call:
    """One request for text on its way through vLLM's serving classes: the `headers` they read, without regard to case,
    and the `state` in which they leave what they counted."""

    headers: Mapping[str, str]
    state: SimpleNamespace = field(default_factory=SimpleNamespace)


class Engine(Protocol):
    """Scores candidates under many adapters at once, and generates text as vLLM's OpenAI server does."""

    max_model_len: int
    vocab_size: int
    dtype: str  # of the base's weights, like "bfloat16"
    room: Room

    async def score(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Candidates,
        adapters: Sequence[Adapter | None],
        *,
        states: bool = False,
    ) -> Scores:
        """Every candidate after every prompt under every adapter; None is the bare base."""
        ...

    async def score_texts(
        self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], trace: Trace
    ) -> list[list[list[float]]]:
        """The rows of the tokens of each text after its prompt, as Text has them, under the mixture of `trace`. Neither
        may be empty, and both together are shorter than max_model_len. Raises Refused for what can never fit."""
        ...

    async def render(self, kind: Kind, body: dict[str, Any]) -> list[list[int]]:
        """Token ids of each prompt of a chat or completion request, as `chat` and `complete` read it.

        Raises Refused.
        """
        ...

    async def chat(
        self, body: dict[str, Any], call: Call | None, trace: Trace | None = None
    ) -> dict[str, Any] | AsyncIterator[str]:
        """An OpenAI chat completion, or its server-sent events; under the mixture of `trace`, which it fills in."""
        ...

    async def complete(
        self, body: dict[str, Any], call: Call | None, trace: Trace | None = None
    ) -> dict[str, Any] | AsyncIterator[str]:
        """An OpenAI completion, or its server-sent events; under the mixture of `trace`, which it fills in."""
        ...

    async def load(self, adapters: Sequence[Adapter], public: Mapping[str, Adapter]) -> None:
        """Hold these adapters in memory; those of `public` also generate text, under its names. All, or none: raises
        PosteriorError with vLLM's reason."""
        ...

    async def unload(self, adapters: Sequence[Adapter], public: Iterable[str]) -> None:
        """Forget them. No request may use them any more."""
        ...

    async def warm_up(self, prompt: list[int]) -> None:
        """Generate a little, so that nobody waits for what the first request compiles."""
        ...

    def usage(self, call: Call) -> Usage | None:
        """Tokens of a chat or completion request that has ended; None if it never reached the engine."""
        ...

    def alive(self) -> bool:
        """Whether the engine's processes run."""
        ...

    def stop(self) -> None:
        """End the engine's processes."""
        ...
