"""An engine, a tokenizer and a posterior without weights: the server's semantics in milliseconds."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posterior.calibration.choice import Choice
from posterior.calibration.records import Key, Record
from posterior.data.candidates import Candidates
from posterior.data.task import Task
from posterior.models.base import Base
from posterior.storage import artefact
from server.engine import Adapter, Call, Kind, Scores, Usage
from server.engine.gang import Text, Trace
from server.errors import Refused
from server.services.registry import Registry, Served

BASE = Base(Path("/nowhere"), "tiny-base", None, "sha256:00")
SPECIAL = "<|im_end|>"
VOCABULARY = 300


class Tokenizer:
    """Bytes as token ids, and one special token, as real tokenizers parse it out of a prompt."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        parts = [list(part.encode()) for part in text.split(SPECIAL)]
        return [token for i, part in enumerate(parts) for token in ([256] if i else []) + part]

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return b"".join(SPECIAL.encode() if token == 256 else bytes([token]) for token in token_ids).decode()

    def get_chat_template(self, **_: Any) -> str:
        return "{# in Python, below #}"

    def apply_chat_template(self, conversation: Any, **_: Any) -> str:
        if conversation[0]["role"] not in ("system", "user"):
            raise ValueError("roles must alternate")
        return "".join(f"{m['role']}: {m['content']}\n" for m in conversation) + "assistant:"


@dataclass
class Posterior:
    """What the server reads of posterior.artefact.Posterior."""

    name: str
    family: str
    hash: str = "abcdef0123456789"
    task: Task = field(default_factory=lambda: Task("choice", "{text}\nSentiment:", (" negative", " positive")))
    calibration: dict[Key, Record] = field(default_factory=dict)
    choice: Choice | None = None
    familiarity: dict[Any, Any] = field(default_factory=dict)

    predictives = artefact.Posterior.predictives


def joined(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def particle_logits(number: int, candidates: int) -> torch.Tensor:
    """Scores of the candidates under the adapter `number` (0: the base). Of one token each, they have half of the
    probability."""
    scores = torch.randn(candidates, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return scores.log_softmax(-1) - math.log(2)


def prompt_state(prompt: Sequence[int], adapter: Adapter | None) -> torch.Tensor:
    """[4], by the prompt's first token and the adapter's number."""
    return torch.tensor([float(prompt[0]), float(adapter.number if adapter else 0), 1.0, -1.0])


@dataclass
class Engine:
    """Scores by adapter number only; text is always "hello", and the most probable next token `top`."""

    max_model_len: int = 64
    vocab_size: int = VOCABULARY
    dtype: str = "bfloat16"
    delay: float = 0.0
    failure: Exception | None = None
    living: bool = True
    top: int = 104
    cached: int = 0  # tokens of each prompt
    scored: list[tuple[int, int]] = field(default_factory=list)  # (prompts, adapters) of each call
    cancelled: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def score(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Candidates,
        adapters: Sequence[Adapter | None],
        *,
        states: bool = False,
    ) -> Scores:
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failure is not None:
            raise self.failure
        self.scored.append((len(prompts), len(adapters)))
        lengths = torch.tensor([len(tokens) for tokens in candidates])  # sums, of which the server takes the mean
        rows = torch.stack([particle_logits(a.number if a else 0, len(candidates)) * lengths for a in adapters])
        top = torch.full((len(prompts), len(adapters)), self.top)
        read = torch.stack([prompt_state(prompt, adapters[0]) for prompt in prompts]) if states else None
        return Scores(rows.expand(len(prompts), *rows.shape), top, [self.cached] * len(prompts), read)

    async def render(self, kind: Kind, body: dict[str, Any]) -> list[list[int]]:
        """As vLLM reads a request: text parts are joined by line breaks, and ids are taken as they are."""
        if kind == "chat":
            messages = [{"role": m["role"], "content": joined(m["content"])} for m in body["messages"]]
            try:
                return [Tokenizer().encode(Tokenizer().apply_chat_template(messages))]
            except ValueError as error:
                raise Refused(f"the chat template refuses these messages: {error}", "messages") from error
        prompt = body["prompt"]
        prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        return [Tokenizer().encode(item) if isinstance(item, str) else item for item in prompts]

    async def chat(
        self, body: dict[str, Any], call: Call | None, trace: Trace | None = None
    ) -> dict[str, Any] | AsyncIterator[str]:
        self._trace(trace)
        return self._reply(
            body, {"message": {"role": "assistant", "content": "hello"}}, {"delta": {"content": "hello"}}
        )

    async def complete(
        self, body: dict[str, Any], call: Call | None, trace: Trace | None = None
    ) -> dict[str, Any] | AsyncIterator[str]:
        self._trace(trace)
        return self._reply(body, {"text": "hello"}, {"text": "hello"})

    @staticmethod
    def _trace(trace: Trace | None) -> None:
        """One token that every particle gives probability 1/2, in each of up to two choices."""
        if trace is not None:
            row = [math.log(0.5)] * len(trace.adapters) + [1.0, 0.75]
            trace.texts.append([Text([row], delivered=1) for _ in range(2)])

    def _reply(self, body: dict[str, Any], whole: dict[str, Any], part: dict[str, Any]) -> Any:
        self.bodies.append(body)
        if self.failure is not None:
            raise self.failure
        if body.get("stream"):
            return self._stream(part)
        name = "chat.completion" if "message" in whole else "text_completion"
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        choices = [{"index": 0, **whole, "finish_reason": "stop"}]
        return {"id": "x", "object": name, "created": 0, "model": "x", "choices": choices, "usage": usage}

    async def _stream(self, part: dict[str, Any]) -> AsyncIterator[str]:
        import json

        for finish in (None, "stop"):
            choice = {"index": 0, **part, "finish_reason": finish}
            yield f"data: {json.dumps({'choices': [choice]}, separators=(',', ':'))}\n\n"
        yield "data: [DONE]\n\n"

    async def warm_up(self, prompt: list[int]) -> None: ...

    def usage(self, call: Call) -> Usage | None:
        return Usage(3, 2)

    def alive(self) -> bool:
        return self.living

    def stop(self) -> None: ...


@dataclass
class Linearizer:
    """One Gaussian for every prompt."""

    failure: Exception | None = None
    dtype: str = "float32"
    problem: Exception | None = None

    def check(self) -> None:
        if self.problem is not None:
            raise self.problem

    async def moments(self, name: str, prompts: Any, candidates: Candidates) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self.failure is not None:
            raise self.failure
        c = len(candidates)
        covariance = torch.diag(torch.cat([torch.zeros(1), torch.ones(c - 1)])).double()
        return [(torch.arange(c).double(), covariance) for _ in prompts]


def registry() -> Registry:
    """The base, a Laplace posterior "mood" with 8 particles and a particle posterior "gang" with 3 unequal ones."""
    served = {BASE.id: Served(BASE.id)}
    number = 1
    for posterior, weights in (
        (Posterior("mood", "laplace"), (1 / 8,) * 8),
        (Posterior("gang", "particles"), (0.5, 0.3, 0.2)),
    ):
        count = len(weights)
        name, label = posterior.name, f"{posterior.name}@{posterior.hash[:12]}"
        map_adapter = Adapter(label, Path("/nowhere/map"), number)
        particles = tuple(Adapter(f"{label}/{k:03d}", Path(f"/nowhere/{k}"), number + 1 + k) for k in range(count))
        number += 1 + count
        served[name] = Served(name, posterior, map_adapter, particles, weights)  # type: ignore[arg-type]
        served[f"{name}/map"] = Served(f"{name}/map", posterior, map_adapter)  # type: ignore[arg-type]
    return Registry(BASE, served)
