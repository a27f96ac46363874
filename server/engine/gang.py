"""What the front end, the scheduler and the sampler send each other about a gang."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from posterior.predictive.decoding import Mixing
from server.engine import Adapter

LEADER = "posterior_gang"  # in a leader's SamplingParams.extra_args: {"key", "adapters", "weights", "mixing"}
GIVEN = "posterior_given"  # in a leader's whose prompt is scored: how many tokens stand before those that are; 1
SIBLING = "posterior_sibling"  # in a sibling's: [leader's request id, number of the particle]
NOTE = "posterior_note"  # in a leader's EngineCoreOutput.kv_transfer_params, which nobody else uses here:
# {"key", "row": [log p_1 .. log p_K, total, aleatoric] of the token, "prompt": such rows if it is scored, "resumed"}
STATE = "posterior_state"  # in a plain request's SamplingParams.extra_args: the key under which its note comes back,
# {"key", "state": what the LM head reads at the prompt's last token, float32 as bytes}
MAX_SCORED = 2**16  # tokens of an echoed prompt x particles: hidden states that are kept until all have read it


@dataclass
class Text:
    """One text that is being written: a row [log p_1, ..., log p_K, total entropy, aleatoric entropy] per token; the
    tokens that have been handed out; how many of those a stream has described, and the particles' log-weights after
    these (None: the posterior's own). `context`: the token ids of its prompt."""

    rows: list[list[float]] = field(default_factory=list)
    prompt: list[list[float]] = field(default_factory=list)  # likewise of the prompt's tokens that are scored, if any
    context: Sequence[int] = ()
    tokens: list[int] = field(default_factory=list)
    described: int = 0
    log_weights: torch.Tensor | None = None

    @property
    def delivered(self) -> int:
        """How many tokens have been handed out."""
        return len(self.tokens)


@dataclass
class Trace:
    """A request for text under a mixture of particles and, as it is answered, what became of it.

    `adapters`: the particles, or (None,): the base alone. `texts` has an entry for each prompt and each of its n
    choices. `explicit`: the client set max_tokens itself.
    """

    adapters: tuple[Adapter | None, ...]
    weights: tuple[float, ...]
    mixing: Mixing
    explicit: bool = False
    texts: list[list[Text]] = field(default_factory=list)
    resumed: int = 0

    def extra_args(self, key: str) -> dict[str, Any]:
        """What the leader's sampling parameters carry to the engine's processes; notes come back under `key`."""
        adapters = [None if a is None else [a.name, a.number, str(a.path)] for a in self.adapters]
        return {LEADER: {"key": key, "adapters": adapters, "weights": list(self.weights), "mixing": self.mixing}}

    def text(self, choice: int) -> Text:
        """The text of a choice as OpenAI numbers them: the n choices of the first prompt, then those of the next."""
        n = len(self.texts[0])
        return self.texts[choice // n][choice % n]


CURRENT: ContextVar[Trace | None] = ContextVar("CURRENT", default=None)  # of the HTTP request being handed to vLLM
