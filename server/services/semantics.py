"""What the samples of a text say about what it means (nats throughout)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posterior.meaning import Grouping
from posterior.meaning.exact import exact
from posterior.predictive.meanings import Meanings, meanings
from server.engine.gang import Trace
from server.services.options import MeaningName, Returned
from server.services.texts import Writer

GROUPINGS: Mapping[MeaningName, Grouping] = {"exact": exact}


@dataclass(frozen=True)
class Samples:
    """The n samples of one prompt, the most probable first: their numbers in the order of drawing, their texts, and
    log p_k of each [n, K], of all its tokens, with the one that ends it. truncated: how many max_tokens cut."""

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


def samples(trace: Trace, prompt: int, texts: Sequence[str], truncated: int) -> Samples:
    """What the trace holds of the samples of a prompt, whose texts are these."""
    k = len(trace.adapters)
    rows = [text.rows[: text.delivered] for text in trace.texts[prompt]]
    tables = [torch.tensor(row, dtype=torch.float64).view(len(row), k + 2) for row in rows]
    log_p = torch.stack([table[:, :k].sum(0) for table in tables])
    log_weights = torch.tensor(trace.weights, dtype=torch.float64).log()
    order = (log_p + log_weights).logsumexp(1).argsort(descending=True, stable=True)
    numbers = tuple(order.tolist())
    return Samples(numbers, tuple(texts[i] for i in numbers), log_p[order], log_weights, truncated)


def semantic(writer: Writer, drawn: Samples, greedy: str | None = None) -> Semantic:
    """The meanings of the samples; `greedy`: the text that is returned in the place of one of them. Counts them.

    Of equally probable meanings the first is the one with the most probable sample: groups are numbered in the order
    of the samples.
    """
    name = writer.options.meaning or "exact"
    groups = GROUPINGS[name]([*drawn.texts, *([] if greedy is None else [greedy])])
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
