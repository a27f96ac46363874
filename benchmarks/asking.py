"""What benchmarks/decisions.py asks of which server: inputs that no prefix cache has seen, the ways to ask, the
cache's counters.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from posterior.data import decisions
from posterior.data.candidates import encode
from posterior.data.task import Tokenizer
from posterior.models import lora
from posterior.storage import artefact
from posterior.storage.artefact import Posterior
from server.engine.scoring import reads


class Asked(NamedTuple):
    """What is asked of one input: a text or messages."""

    input: Any
    questions: Sequence[dict[str, Any]]


class Post(NamedTuple):
    """A request to one of the servers."""

    url: str
    body: dict[str, Any]


MORE: tuple[dict[str, Any], ...] = (  # after a row's own question, or all that is asked of a long input
    {"type": "predicate", "instructions": "The customer is upset."},
    {"type": "score", "instructions": "How urgent is it?", "levels": [{"label": w} for w in ("low", "medium", "high")]},
    {"type": "choice", "instructions": "Who should answer?", "choices": [{"value": "machine"}, {"value": "person"}]},
    {"type": "predicate", "instructions": "Money has been lost."},
)
BLOCK = 16 if torch.cuda.is_available() else 32  # tokens of a block of the prefix cache (server/engine/config.py)

Way = Callable[[Asked], list[Post]]  # the requests that an input takes, which are sent at once


class Rows:
    """The rows of a file in a random order, again and again, as inputs that begin with a number of their own."""

    def __init__(self, path: Path, seed: int) -> None:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        random.Random(seed).shuffle(rows)
        self._rows: Iterator[dict[str, Any]] = cycle(rows)
        self._numbers = count(10_000)  # of as many digits, which are a token each: all ways read as many tokens

    def take(self, n: int) -> list[dict[str, Any]]:
        """The next rows."""
        return [next(self._rows) for _ in range(n)]

    def asked(self, row: Mapping[str, Any], questions: int) -> Asked:
        """Its own question and others up to so many, about an input that was never asked about."""
        return Asked(self._numbered(row["input"]), (row["question"], *MORE)[:questions])

    def long(self, tokenizer: Tokenizer, tokens: int) -> Callable[[], Asked]:
        """What makes inputs of the next rows as messages, as many as have so many tokens together, with MORE to ask."""
        taken = self.take(1)
        while length(tokenizer, self._messages(taken)) < tokens:
            taken += self.take(1)
        return lambda: Asked(self._messages(taken), MORE)

    def _messages(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        texts = [self._numbered(rows[0]["input"]), *(row["input"] for row in rows[1:])]
        return [{"role": "user", "content": text} for text in texts]

    def _numbered(self, text: str) -> str:
        return f"Message {next(self._numbers)}. {text}"


def transcript(input: Any) -> str:
    """An input as the server reads it."""
    return decisions.transcript(decisions.read(decisions.INPUT, input, "input"))


def length(tokenizer: Tokenizer, input: Any) -> int:
    """Its tokens."""
    return len(tokenizer.encode(transcript(input)))


def scored(posterior: Posterior, tokenizer: Tokenizer, asked: Asked) -> list[tuple[list[int], list[int]]]:
    """(tokens, next tokens to score) of all reads that the questions take of one adapter, in the server's order."""
    found = []
    for question in asked.questions:
        read = decisions.read(decisions.QUESTION, question, "question")
        prompt, answers = posterior.task.ask(tokenizer, transcript(asked.input), read)
        found += [([*prompt, *prefix], children) for prefix, children in reads(encode(tokenizer, answers))]
    return found


# The ways


def single_adapters(posterior: Posterior, particles: int, folder: Path) -> Posterior:
    """A copy of the posterior, and beside it each of its particles as a posterior of that one adapter."""
    config = lora.read_config(posterior.map_dir)
    for k, theta in enumerate(posterior.thetas(particles)):
        artefact.save(
            folder / f"particle-{k}", family="particles", base=posterior.base, task=posterior.task, lora_config=config,
            prior={}, fit={}, mean=theta, particles=[theta], weights=[1.0],
        )  # fmt: skip
    whole = folder / posterior.name
    shutil.copytree(posterior.path, whole)
    return artefact.load(whole)


def own_way(url: str, model: str, options: Mapping[str, Any]) -> Way:
    """All questions of an input in one request."""

    def posts(asked: Asked) -> list[Post]:
        body = {"model": model, "input": asked.input, "questions": list(asked.questions)}
        return [Post(f"{url}/v1/decisions", {**body, "uncertainty": dict(options)})]

    return posts


def single_way(url: str, particles: int) -> Way:
    """The same of each particle, in a request of its own."""
    each = [own_way(url, f"particle-{k}", {"predictive": "map"}) for k in range(particles)]
    return lambda asked: [post for way in each for post in way(asked)]


def stock_way(url: str, posterior: Posterior, tokenizer: Tokenizer) -> Way:
    """The reads that the MAP takes, in a request each to vLLM's own server, which knows its adapter as particle-0."""
    body = {"model": "particle-0", "max_tokens": 1, "temperature": 0, "logprobs": 1}

    def posts(asked: Asked) -> list[Post]:
        return [
            Post(f"{url}/v1/completions", {**body, "prompt": tokens, "logprob_token_ids": children})
            for tokens, children in scored(posterior, tokenizer, asked)
        ]

    return posts


async def send(client: httpx.AsyncClient, posts: Sequence[Post]) -> list[dict[str, Any]]:
    """The replies to requests that are sent at once."""
    replies = await asyncio.gather(*(client.post(post.url, json=post.body) for post in posts))
    return [reply.raise_for_status().json() for reply in replies]


async def seconds(client: httpx.AsyncClient, inputs: Sequence[Sequence[Post]], at_once: int) -> float:
    """How long it takes `at_once` clients to send the requests of all inputs, each client an input after the other."""
    left = iter(inputs)

    async def one() -> None:
        for posts in left:
            await send(client, posts)

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(at_once)))
    return time.perf_counter() - start


# The prefix cache


class Cached(NamedTuple):
    """Tokens that the prefix cache was asked for so far, and those of them that it had."""

    queried: float
    hits: float


async def cache(client: httpx.AsyncClient, url: str) -> Cached:
    """A server's counters."""
    return read_cache((await client.get(f"{url}/metrics")).raise_for_status().text)


def read_cache(metrics: str) -> Cached:
    """Those of Prometheus' text, of all engines."""
    queried, hits = (
        sum(map(float, re.findall(rf"^vllm:prefix_cache_{name}_total(?:{{.*}})? (\S+)$", metrics, re.MULTILINE)))
        for name in ("queries", "hits")
    )
    return Cached(queried, hits)


def shareable(prompts: Sequence[Sequence[int]], block: int = BLOCK) -> int:
    """How many tokens of these prompts a prefix cache can have, in whole blocks, that has seen those before each. The
    last token of a prompt is always read."""
    seen: set[tuple[int, ...]] = set()
    hits = 0
    for tokens in prompts:
        whole = [tuple(tokens[:end]) for end in range(block, len(tokens) + 1, block)]
        hits += block * sum(each in seen and len(each) < len(tokens) for each in whole)
        seen.update(whole)
    return hits
