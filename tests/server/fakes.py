"""An engine, a tokenizer and a posterior without weights: the server's semantics in milliseconds."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posterior.calibration.choice import Choice
from posterior.calibration.records import Key, Record
from posterior.calibration.rightness import TextKey, TextRecord
from posterior.data.candidates import Candidates
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.models.base import Base
from posterior.storage import artefact
from server.engine import Adapter, Call, Kind, Room, Scores, Usage
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

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, **_: Any) -> str:
        special = b"" if skip_special_tokens else SPECIAL.encode()
        return b"".join(special if token == 256 else bytes([token]) for token in token_ids).decode(errors="replace")

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
    texts: dict[TextKey, TextRecord] = field(default_factory=dict)

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


@dataclass(frozen=True)
class Draft:
    """A text, log p_k of its tokens [T, K], why it ends there, and the tokens, where a test needs them."""

    text: str
    log_p: Sequence[Sequence[float]]
    finish: str = "stop"
    tokens: Sequence[int] | None = None


def _text(draft: Draft, prompt: Sequence[int], particles: int) -> Text:
    """What the trace of so many particles holds of a draft."""
    rows = [[*row[:particles], 1.0, 0.75] for row in draft.log_p]
    return Text(rows, context=prompt, tokens=list(draft.tokens or [0] * len(rows)))


@dataclass
class Engine:
    """Scores by adapter number only; the most probable next token is `top`. Text is "hello", of one token that every
    particle gives probability 1/2; but where more than one choice or JSON is asked for, those of each prompt are the
    `drafts` in their order, if there are any. Particle k gives each token of a text to be scored the probability
    1/(k + 2). `scored` and `contexts` have what was scored, and after which tokens."""

    max_model_len: int = 64
    vocab_size: int = VOCABULARY
    dtype: str = "bfloat16"
    delay: float = 0.0
    failure: Exception | None = None
    living: bool = True
    top: int = 104
    cached: int = 0  # tokens of each prompt
    scored: list[tuple[int, int]] = field(default_factory=list)  # (prompts, adapters) of each call
    contexts: list[list[int]] = field(default_factory=list)
    cancelled: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    room: Room = Room(slots=9, places=40, rank=8, targets=("q_proj", "v_proj"))
    loaded: list[int] = field(default_factory=list)  # numbers of adapters
    refuses: set[str] = field(default_factory=set)  # folders of adapters
    drafts: list[Draft] = field(default_factory=list)

    async def score(
        self,
        prompts: Sequence[Sequence[int]],
        candidates: Candidates,
        adapters: Sequence[Adapter | None],
        *,
        states: bool = False,
    ) -> Scores:
        await self._wait()
        if self.failure is not None:
            raise self.failure
        self.scored.append((len(prompts), len(adapters)))
        self.contexts += [list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(tokens) for tokens in candidates])  # sums, of which the server takes the mean
        rows = torch.stack([particle_logits(a.number if a else 0, len(candidates)) * lengths for a in adapters])
        top = torch.full((len(prompts), len(adapters)), self.top)
        read = torch.stack([prompt_state(prompt, adapters[0]) for prompt in prompts]) if states else None
        return Scores(rows.expand(len(prompts), *rows.shape), top, [self.cached] * len(prompts), read)

    async def score_texts(
        self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], trace: Trace
    ) -> list[list[list[float]]]:
        self.scored.append((len(prompts), len(trace.adapters)))
        await self._wait()
        if self.failure is not None:
            raise self.failure
        row = [*(-math.log(k + 2) for k in range(len(trace.adapters))), 1.0, 0.75]
        return [[row for _ in text] for text in texts]

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
        return await self._write("chat", body, call, trace)

    async def complete(
        self, body: dict[str, Any], call: Call | None, trace: Trace | None = None
    ) -> dict[str, Any] | AsyncIterator[str]:
        return await self._write("completion", body, call, trace)

    async def _write(self, kind: Kind, body: dict[str, Any], call: Call | None, trace: Trace | None) -> Any:
        self.bodies.append(body)
        if self.failure is not None:
            raise self.failure
        n, k = body.get("n") or 1, len(trace.adapters) if trace else 0
        hello = Draft("hello", [[math.log(0.5)] * k])
        own = self.drafts and (n > 1 or any(body.get(name) for name in ("response_format", "structured_outputs")))
        drafts = [self.drafts[i % len(self.drafts)] if own else hello for i in range(n)]
        prompts: list[list[int]] = [[]] if kind == "chat" else await self.render(kind, body)
        if trace is not None:
            trace.texts += [[_text(draft, prompt, k) for draft in drafts] for prompt in prompts]
        written = sum(len(draft.log_p) for draft in drafts) * len(prompts)
        if call is not None:
            call.state.usage = Usage(3, written)
        if body.get("stream"):
            usage = (body.get("stream_options") or {}).get("include_usage")
            counts = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
            return self._stream(kind, drafts[0], counts if usage else None)
        if self.delay and n > 1:
            await self._wait()
        return self._reply(kind, drafts * len(prompts), written)

    async def _wait(self) -> None:
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    @staticmethod
    def _reply(kind: Kind, drafts: list[Draft], written: int) -> dict[str, Any]:
        said: list[dict[str, Any]] = [
            {"message": {"role": "assistant", "content": draft.text}} if kind == "chat" else {"text": draft.text}
            for draft in drafts
        ]
        choices = [
            {"index": index, **each, "logprobs": None, "finish_reason": draft.finish}
            for index, (each, draft) in enumerate(zip(said, drafts, strict=True))
        ]
        usage = {"prompt_tokens": 3, "completion_tokens": written, "total_tokens": 3 + written}
        name = "chat.completion" if kind == "chat" else "text_completion"
        return {"id": "x", "object": name, "created": 0, "model": "x", "choices": choices, "usage": usage}

    async def _stream(self, kind: Kind, draft: Draft, usage: dict[str, int] | None) -> AsyncIterator[str]:
        import json

        def line(body: dict[str, Any]) -> str:
            return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"

        for text, finish in ((draft.text, None), ("", draft.finish)):
            part = {"delta": {"content": text}} if kind == "chat" else {"text": text}
            yield line({"id": "x", "choices": [{"index": 0, **part, "finish_reason": finish}]})
        if usage is not None:
            yield line({"id": "x", "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    async def load(self, adapters: Sequence[Adapter], public: Mapping[str, Adapter]) -> None:
        await self._wait()
        for adapter in adapters:
            if adapter.path.name in self.refuses:
                raise PosteriorError(f"vLLM does not load the adapter {adapter.path}: it is broken")
        self.loaded += [adapter.number for adapter in adapters]

    async def unload(self, adapters: Sequence[Adapter], public: Iterable[str]) -> None:
        self.loaded = [number for number in self.loaded if number not in {each.number for each in adapters}]

    async def warm_up(self, prompt: list[int]) -> None: ...

    def usage(self, call: Call) -> Usage | None:
        return getattr(call.state, "usage", None)

    def alive(self) -> bool:
        return self.living

    def stop(self) -> None: ...


@dataclass
class Linearizer:
    """One Gaussian for every prompt."""

    failure: Exception | None = None
    dtype: str = "float32"
    problem: Exception | None = None
    held: set[str] = field(default_factory=set)

    async def start(self) -> None: ...

    async def load(self, name: str, folder: Any) -> None:
        self.check()
        self.held.add(name)

    async def unload(self, name: str) -> None:
        self.held.discard(name)

    def stop(self) -> None: ...

    def check(self) -> None:
        if self.problem is not None:
            raise self.problem

    async def moments(self, name: str, prompts: Any, candidates: Candidates) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self.failure is not None:
            raise self.failure
        c = len(candidates)
        covariance = torch.diag(torch.cat([torch.zeros(1), torch.ones(c - 1)])).double()
        return [(torch.arange(c).double(), covariance) for _ in prompts]


@dataclass
class Comparer:
    """Texts mean the same if they begin with the same letter, in either case."""

    names: frozenset[str] = frozenset({"embedding", "nli"})
    problem: Exception | None = None
    failure: Exception | None = None
    asked: list[tuple[str, str, int]] = field(default_factory=list)  # the name, the question, how many others

    def check(self) -> None:
        if self.problem is not None:
            raise self.problem

    def identity(self, name: str) -> str:
        return f"{name}-0123"

    async def same(self, name: str, question: str, text: str, others: Sequence[str]) -> list[bool]:
        self.asked.append((name, question, len(others)))
        if self.failure is not None:
            raise self.failure
        return [same_initial(text, other) for other in others]


def same_initial(one: str, other: str) -> bool:
    return one.strip()[:1].lower() == other.strip()[:1].lower()


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
