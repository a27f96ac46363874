"""What the samples of a text say about what it means (nats throughout)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posterior.predictive.meanings import Meanings, meanings
from server.engine.gang import Trace
from server.services.meanings import grouped
from server.services.options import MeaningName, Returned
from server.services.texts import Writer


@dataclass(frozen=True)
class Samples:
    """The n samples of one prompt, the most probable first: their numbers in the order of drawing, their texts, and
    log p_k of each [n, K], of all its tokens, with the one that ends it. question: what they answer; truncated: how
    many max_tokens cut."""

    question: str
    numbers: tuple[int, ...]
    texts: tuple[str, ...]
    log_p: Tensor
    log_weights: Tensor
    truncated: int


@dataclass(frozen=True)
class Semantic:
    """The meanings of samples: how they are told apart, and which text is returned. examples: the number of each
    meaning's most probable sample in the order of drawing, and its text; own: the returned text's meaning, None where
    no sample has it."""

    meaning: MeaningName
    returned: Returned
    found: Meanings
    examples: tuple[tuple[int, str], ...]
    own: int | None
    truncated: int


def samples(trace: Trace, prompt: int, question: str, texts: Sequence[str], truncated: int) -> Samples:
    """What the trace holds of the samples of a prompt, whose texts are these, as answers to the question."""
    k = len(trace.adapters)
    rows = [text.rows[: text.delivered] for text in trace.texts[prompt]]
    tables = [torch.tensor(row, dtype=torch.float64).view(len(row), k + 2) for row in rows]
    log_p = torch.stack([table[:, :k].sum(0) for table in tables])
    log_weights = torch.tensor(trace.weights, dtype=torch.float64).log()
    order = (log_p + log_weights).logsumexp(1).argsort(descending=True, stable=True)
    numbers = tuple(order.tolist())
    return Samples(question, numbers, tuple(texts[i] for i in numbers), log_p[order], log_weights, truncated)


async def semantic(writer: Writer, drawn: Samples, greedy: str | None = None) -> Semantic:
    """The meanings of the samples; `greedy`: the text that is returned in the place of one of them. Counts them.

    Of equally probable meanings the first is the one with the most probable sample: groups are numbered in the order
    of the samples. Raises RequestError where they cannot be told apart.
    """
    name = writer.options.meaning or "exact"
    texts = [*drawn.texts, *([] if greedy is None else [greedy])]
    groups = await grouped(writer.service, name, drawn.question, texts)
    n = len(drawn.texts)
    found = meanings(drawn.log_p, drawn.log_weights, groups[:n], coverage=writer.options.coverage)
    writer.service.metrics.count_meanings(writer.served.owner, found.predictive, writer.new_resumes())
    firsts = [found.example(m) for m in range(len(found.error))]
    mine = groups.index(groups[n]) if greedy is not None else firsts[0]
    return Semantic(
        meaning=name,
        returned="meaning" if greedy is None else "greedy",
        found=found,
        examples=tuple((drawn.numbers[i], drawn.texts[i]) for i in firsts),
        own=int(found.group[mine]) if mine < n else None,
        truncated=drawn.truncated,
    )
