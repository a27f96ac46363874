"""Texts that are given: how probable each is after its prompt, under a posterior (nats throughout)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posterior.calibration.rightness import TextKind
from posterior.data.task import Tokenizer
from posterior.data.tokens import continuation
from posterior.errors import PosteriorError
from server.engine.gang import MAX_SCORED, Trace
from server.errors import PromptRefused, Refused
from server.services.keeping import Keeper
from server.services.options import MAX_SEQUENCES, PredictiveName, TextUncertainty, Uncertainty
from server.services.predictive import Service, check_size
from server.services.registry import Served
from server.services.rightness import judge, text_key
from server.services.texts import Written, mixture_of, predictive_of


@dataclass(frozen=True)
class Given:
    """What is asked of one posterior: prompts and the text that continues each, as token ids; the trace of what reads
    them."""

    served: Served
    options: Uncertainty
    predictive: PredictiveName
    trace: Trace
    prompts: list[list[int]]
    texts: list[list[int]]

    @property
    def kind(self) -> TextKind | None:
        """How the texts come about, where that is a way that a calibration may be of."""
        return "given" if self.trace.mixing == "sequence" else None

    def keep(self, id: str, keeper: Keeper, records: Sequence[dict[str, Any]], scored: Sequence[Written]) -> None:
        """Keeps the texts, whose clients are told these records, as parts of the reply `id`; of the base alone none."""
        if self.served.posterior is None:
            return
        particles = len(self.trace.adapters)
        key = text_key(keeper.service, self.served, TextUncertainty(), self.predictive, particles, self.kind)
        for item, (record, each) in enumerate(zip(records, scored, strict=True)):
            keeper.text(id, item, self.served, record, key, each.text)

    @property
    def tokens(self) -> int:
        """That are read."""
        return sum(map(len, self.prompts)) + sum(map(len, self.texts))


async def read(
    service: Service, served: Served, options: Uncertainty, prompts: list[list[int]], texts: Sequence[str]
) -> Given:
    """The question, of which everything but its place in the KV cache has been checked. `texts`: one for each prompt.

    Raises Refused.
    """
    predictive, trace = mixture_of(served, options)
    k = len(trace.adapters)
    check_size(len(prompts) * k, MAX_SEQUENCES, "sequences (prompts x particles)")
    encoded = await asyncio.to_thread(_encoded, service.tokenizer, texts)
    longest = service.engine.max_model_len - 1  # vLLM writes a token after what it reads, and keeps a place for it
    for index, (prompt, text) in enumerate(zip(prompts, encoded, strict=True)):
        service.check_prompt(index, prompt, len(text), longest, "a text")
        read = len(prompt) + len(text)
        if k * read > MAX_SCORED:
            raise PromptRefused(
                index,
                f"and its text have {read} tokens; times {k} particles that is {k * read}, and at most {MAX_SCORED} "
                "are scored: send shorter ones, or ask for fewer 'particles'",
            )
    return Given(served, options, predictive, trace, prompts, encoded)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, exactly as it continues a prompt, without an end. Raises Refused."""
    found = []
    for index, text in enumerate(texts):
        try:
            found.append(continuation(tokenizer, text))
        except PosteriorError as error:
            raise Refused(f"text {index}: {error}", "texts") from error
        if not found[-1]:
            raise Refused(f"text {index} has no tokens; give one that has", "texts")
    return found


async def score(service: Service, asked: Given) -> list[Written]:
    """The uncertainty of each text, in order; counts it. Raises Refused for what the KV cache cannot hold."""
    found: list[Written] = []
    known = judge(service, asked.served, TextUncertainty(), asked.predictive, len(asked.trace.adapters), asked.kind)
    for rows in await service.engine.score_texts(asked.prompts, asked.texts, asked.trace):
        result = predictive_of(asked.trace, rows)
        service.metrics.count_text(asked.served.owner, result, 0 if found else asked.trace.resumed)
        found.append(
            Written(
                posterior=asked.served.label,
                predictive=asked.predictive,
                mixing=asked.trace.mixing,
                particles=len(asked.trace.adapters),
                text=result,
                right=None if known is None else known(result, None, None),
                prompt=None,
                tokens=result if asked.options.tokens else None,
                per_particle=asked.options.per_particle,
            )
        )
    return found
