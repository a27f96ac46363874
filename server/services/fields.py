"""How probable each leaf of a structured text is, given what stands before it (nats throughout).

Where the schema lists a leaf's values, all of them are scored in its place: sum_k w_k p_k(value), with the particles'
weights w_k after the text before it, is normalised over the values. That is the mixture, cut to these values. Any other
leaf has the probability of its own tokens under the mixture, before any mask.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posterior.data import candidates as candidate_values
from posterior.data.candidates import Candidates
from posterior.data.tokens import Tokenizer
from posterior.errors import PosteriorError
from posterior.predictive.decoding import TextPredictive
from posterior.predictive.mixture import Predictive, among
from server.engine.gang import Text, Trace
from server.engine.scoring import reads
from server.errors import first
from server.services.alternatives import alternatives, same
from server.services.leaves import Leaf, Path, Scalar, Spelled, leaves, spelled
from server.services.options import MAX_SEQUENCES
from server.services.texts import Writer, predictive_of


@dataclass(frozen=True)
class Place:
    """A leaf in its text: its tokens [start, stop), and the values that the schema lists for it, if it does.

    candidates: the tokens of each of them in its place, None where they are not scored. own: the number of its own.
    """

    leaf: Leaf
    start: int
    stop: int
    values: tuple[Scalar, ...] | None = None
    candidates: Candidates | None = None
    own: int = 0


@dataclass(frozen=True)
class Field:
    """What is known of a leaf. text: of its own tokens. predictive: over the values that the schema lists, if they were
    scored, else over its own value and everything else; its own is number `place.own`."""

    place: Place
    text: TextPredictive
    predictive: Predictive


async def fields(writer: Writer, trace: Trace, choice: int) -> list[Field]:
    """Each complete leaf of a finished choice, in order."""
    text = trace.text(choice)
    places = await asyncio.to_thread(_places, writer, trace, text)
    try:
        async with asyncio.TaskGroup() as group:  # one failure, or a client that has left, aborts all siblings
            tasks = [group.create_task(_scores(writer, trace, text, place)) for place in places]
    except ExceptionGroup as errors:
        raise first(errors) from errors
    scores = [task.result() for task in tasks]
    return await asyncio.to_thread(_fields, trace, text, places, scores, writer.options.coverage)


async def _scores(writer: Writer, trace: Trace, text: Text, place: Place) -> Tensor | None:
    """log p_k [K, C] of the values in their place, if they are to be scored."""
    if place.candidates is None:
        return None
    if len(place.candidates) == 1:
        return torch.zeros(len(trace.adapters), 1)  # the schema leaves no doubt
    prompt = [*text.context, *text.tokens[: place.start]]
    return (await writer.service.engine.score([prompt], place.candidates, trace.adapters)).log_p[0]


def _fields(
    trace: Trace, text: Text, places: Sequence[Place], scores: Sequence[Tensor | None], coverage: float
) -> list[Field]:
    """What the scores, and without them the rows of its own tokens, say about each leaf."""
    log_weights = predictive_of(trace, text.rows[: text.delivered]).log_weights
    found = []
    for place, log_p in zip(places, scores, strict=True):
        before = log_weights[place.start]
        own = predictive_of(trace, text.rows[place.start : place.stop], before)
        if log_p is None:
            mine = own.particles.sum(0).clamp(max=0)  # rounding
            log_p = torch.stack([mine, torch.log1p(-mine.exp())], 1)
        found.append(Field(place, own, among(log_p, before, coverage)))
    return found


def _places(writer: Writer, trace: Trace, text: Text) -> list[Place]:
    """The leaves, with the values to be scored: as many as the reads of one request and the context allow."""
    tokenizer, engine = writer.service.tokenizer, writer.service.engine
    known = spelled(tokenizer, text.tokens)
    reads_left = MAX_SEQUENCES // sum(map(len, trace.texts))
    found: list[Place] = []
    before: dict[Path, Scalar] = {}
    for leaf in leaves(known.text):
        place = _place(tokenizer, known, text.tokens, leaf, alternatives(writer.form, leaf.path, before))
        before[leaf.path] = leaf.value
        if place is None:
            continue
        candidates = place.candidates or ()
        cost = len(trace.adapters) * len(reads(candidates))
        longest = len(text.context) + place.start + max(map(len, candidates), default=0)
        if cost > reads_left or longest > engine.max_model_len:
            place = replace(place, candidates=None)
        else:
            reads_left -= cost
        found.append(place)
    return found


def _place(
    tokenizer: Tokenizer, known: Spelled, tokens: Sequence[int], leaf: Leaf, values: tuple[Scalar, ...] | None
) -> Place | None:
    """The tokens of a leaf, and of each value that may stand there; None for a number that may go on.

    The tokens are those that hold any of the characters that tell its values apart. Those of a string begin behind its
    first quote and end with its last. A number ends with the character after it.
    """
    written = known.text[leaf.start : leaf.end]
    own = next((i for i, value in enumerate(values or ()) if same(value, leaf.value)), None)
    if values is None or own is None:
        values, own = None, 0
    spellings = [_spelling(value) for value in values or ()]
    spellings[own : own + 1] = [written]  # there are several ways to write most values
    quote = int(all(each.startswith('"') for each in spellings))
    number = any(each[0] in "-0123456789" for each in spellings)
    held = known.holding(leaf.start + quote, leaf.end + number)
    if held is None:
        return None if values is None else _place(tokenizer, known, tokens, leaf, None)
    start, stop = held
    place = Place(leaf, start, stop, values, None, own)
    if values is None:
        return place
    before = known.text[known.starts[start] : leaf.start + quote]
    after = known.text[leaf.end - quote : known.ends[stop - 1]]
    special = tokens[stop - 1 : stop] if known.starts[stop - 1] == known.ends[stop - 1] else []
    texts = [before + each[quote : len(each) - quote] + after for each in spellings]
    return replace(place, candidates=_encoded(tokenizer, texts, special))


def _spelling(value: Scalar) -> str:
    """A value as grammars write it: without escapes that JSON does not ask for, and 1 for 1.0."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return json.dumps(value, ensure_ascii=False)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str], special: Sequence[int]) -> Candidates | None:
    """The tokens of these texts, each with the special tokens behind it; of a single one none, since there is nothing
    to score. None where the tokenizer cannot write them."""
    if len(texts) == 1:
        return ((),)
    try:
        return tuple((*each, *special) for each in candidate_values.encode(tokenizer, texts))
    except PosteriorError:
        return None
