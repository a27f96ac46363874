"""Rows as token sequences: a prompt, its possible continuations, and which one is true."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from posterior.data import candidates, decisions
from posterior.data.chat import answered_ids
from posterior.data.reading import Row
from posterior.data.scoring import Scoring
from posterior.data.task import Task, Tokenizer
from posterior.data.tokens import continuation
from posterior.errors import PosteriorError


@dataclass(frozen=True)
class Example:
    """prompt: token ids. continuations: C candidates (choice) or the one response (text). label: index of the true
    one. spread: covariance [C, C] of the scores under the current posterior, None while theta is a point."""

    prompt: tuple[int, ...]
    continuations: candidates.Candidates
    label: int
    spread: Tensor | None = None

    @property
    def is_choice(self) -> bool:
        return len(self.continuations) > 1

    @property
    def single(self) -> bool:
        """Scored by the LM head's rows at the last prompt position; otherwise by teacher forcing."""
        return self.is_choice and candidates.single_token(self.continuations)

    @property
    def length(self) -> int:
        return len(self.prompt) + (0 if self.single else max(map(len, self.continuations)))

    @property
    def row(self) -> int:
        """Tokens of a row with all continuations."""
        return len(self.prompt) + (0 if self.single else sum(map(len, self.continuations)))

    @property
    def sequences(self) -> int:
        """Sequences of `length` that scoring it takes, at most."""
        return 1 if self.single else len(self.continuations)


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """Rows, and the rule that scores their candidates: their task's."""

    rows: Sequence[Example]
    scoring: Scoring = Scoring()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        return replace(self, rows=self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def take(self, indices: Iterable[int]) -> Examples:
        """The rows with these indices, in their order."""
        return replace(self, rows=[self.rows[index] for index in indices])


@dataclass(frozen=True)
class Batch:
    """B examples as left-padded rows, S = B of them: the prompt (single-token choices), or the prompt and all its
    continuations one after the other, none of which sees another (teacher forcing). `separate` has S = B * C rows.

    tokens, mask, positions: [S, T]; answer: [B, C] token ids (single) or None; branch: [S, T], 0 in the prompt and
    c + 1 in continuation c, or None where a row has at most one; target: [S, B * C / S, L] the continuations' ids, -100
    after their ends, and source, of the same shape: the position that predicts each, from the row's end (-1 is its
    last); both None without teacher forcing; label: [B]; scoring: of its continuations; spread: [B, C, C] or None.
    """

    tokens: Tensor
    mask: Tensor
    positions: Tensor
    answer: Tensor | None
    branch: Tensor | None
    target: Tensor | None
    source: Tensor | None
    label: Tensor
    scoring: Scoring
    spread: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """With every tensor changed."""
        changed: dict[str, Any] = {k: change(v) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Batch(**changed)

    def separate(self) -> Batch:
        """The same with a row for each continuation: the prompt, which is repeated, and it."""
        if self.branch is None or self.target is None or self.source is None:
            return self
        count, width = self.target.shape[1], self.tokens.shape[1]
        own = torch.arange(1, count + 1, device=self.branch.device)[:, None]
        branch = self.branch[:, None]
        kept = ((branch == 0) | (branch == own)) & self.mask.bool()[:, None]  # [B, C, T]
        order = kept.int().argsort(dim=2, stable=True)  # what is not kept becomes padding, on the left
        shortest = int(width - kept.sum(2).max())

        def moved(value: Tensor) -> Tensor:
            rows = value[:, None].expand(-1, count, -1).gather(2, order).flatten(0, 1)
            return rows[:, shortest:]

        mask = kept.gather(2, order).flatten(0, 1)[:, shortest:].to(self.mask)
        source = order.argsort(dim=2).gather(2, self.source + width) - width
        return replace(
            self,
            tokens=moved(self.tokens) * mask,
            mask=mask,
            positions=moved(self.positions) * mask,
            branch=None,
            target=self.target.flatten(0, 1)[:, None],
            source=source.flatten(0, 1)[:, None],
        )


def data_hash(rows: Sequence[Row]) -> str:
    """sha256 of the rows' canonical JSON: how an artefact refers to data it does not copy."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return "sha256:" + digest.hexdigest()


def digests(examples: Sequence[Example]) -> Tensor:
    """64 bits of the sha256 of each example's tokens, prompt and candidates, int64 [N]: enough to know it again."""
    found = [hashlib.sha256(repr((e.prompt, tuple(e.continuations))).encode()).digest()[:8] for e in examples]
    return torch.tensor([int.from_bytes(each, "big", signed=True) for each in found], dtype=torch.int64)


def encode(
    task: Task,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    longest: float = math.inf,
    limit: str = "",
    source: object = "",
) -> Examples:
    """Examples of all rows, of at most `longest` tokens each; `limit` says where that number is from, `source` where
    the rows are.

    A bad row is an error that names its number; nothing is cut silently. Raises PosteriorError.
    """
    examples = []
    where = f"{source}, row" if source else "row"
    for number, row in enumerate(rows, 1):
        try:
            example = _READERS[task.kind](task, tokenizer, row)
        except PosteriorError as error:
            raise PosteriorError(f"{where} {number}: {error}") from None
        if example.length > longest:
            raise PosteriorError(f"{where} {number} has {example.length} tokens, more than {limit}; shorten or drop it")
        examples.append(example)
    return Examples(examples, Scoring("sum") if task.kind == "text" else task.scoring)


def _choice(task: Task, tokenizer: Tokenizer, row: Row) -> Example:
    answers = task.answers or row.get("choices")
    if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
        raise PosteriorError("the task has no answers and the row no list 'choices'; give one of them")
    label = _label(row, answers)
    prompt = task.prompt_ids(tokenizer, row)
    if not prompt:
        raise PosteriorError("the prompt is empty")
    return Example(tuple(prompt), candidates.encode(tokenizer, answers), label)


def _label(row: Row, answers: Sequence[str]) -> int:
    """The index that a row's `label` is or means."""
    label = row.get("label")
    label = _index(label, answers) if isinstance(label, str) else label
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(answers):
        raise PosteriorError(
            f"label {row.get('label')!r} is neither one of {list(answers)} nor an index below {len(answers)}"
        )
    return label


def _index(label: str, answers: Sequence[str]) -> int | str:
    """Which answer a label in words is; CSV has indices in words too, which count where no answer is alike."""
    stripped = [answer.strip() for answer in answers]
    for known, wanted in ((list(answers), label), (stripped, label.strip())):
        if known.count(wanted) == 1:
            return known.index(wanted)
    return int(label) if re.fullmatch("[0-9]{1,4}", label.strip()) and label.strip() not in stripped else label


def _text(task: Task, tokenizer: Tokenizer, row: Row) -> Example:
    """Rows of OpenAI fine-tuning `messages` and `tools`, or the template's fields with a `response`."""
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        raise PosteriorError("the base's tokenizer has no token that ends a text; a text task needs one")
    if "messages" in row:
        prompt, response = answered_ids(tokenizer, row["messages"], row.get("tools"))
    else:
        text = row.get("response")
        if not isinstance(text, str) or not text:
            raise PosteriorError("no response text; add an assistant message or a field 'response'")
        prompt, response = task.prompt_ids(tokenizer, row), continuation(tokenizer, text)
    if not prompt:
        raise PosteriorError("the prompt is empty")
    return Example(tuple(prompt), ((*response, end),), 0)


def _decision(task: Task, tokenizer: Tokenizer, row: Row) -> Example:
    """A row {"input", "question", "answer"} in the form of POST /v1/decisions, or {"text", "label"} of the task's own
    question."""
    question, input = task.question_of(row), row.get("input", row.get("text"))
    prompt, answers = task.ask(tokenizer, decisions.read(decisions.INPUT, input, "input"), question)
    said = row.get("answer")
    label = decisions.answer(question, said) if said is not None else _label(row, [o.words for o in question.options])
    return Example(tuple(prompt), candidates.encode(tokenizer, answers), label)


_READERS = {"choice": _choice, "decision": _decision, "text": _text}

ROWS, TOKENS = 32, 4096  # of a batch of predictions, at most: gradients of long rows would fill any memory
WINDOW = 8  # batches whose rows are sorted by length, so that little is padded


def shuffled(examples: Sequence[Example], size: int, generator: torch.Generator) -> list[int]:
    """A random order for batches of `size`. Rows of like length stand together: of every WINDOW batches' rows, drawn at
    random, the shortest make the first batch, and so on; then the batches are shuffled. A last, smaller one stays
    last."""
    order = torch.randperm(len(examples), generator=generator).tolist()
    windows = [order[start : start + WINDOW * size] for start in range(0, len(order), WINDOW * size)]
    together = [index for window in windows for index in sorted(window, key=lambda i: _likeness(examples[i]))]
    whole = len(together) // size
    drawn = torch.randperm(whole, generator=generator).tolist()
    return [i for n in [*drawn, whole] for i in together[n * size : (n + 1) * size]]


def _likeness(example: Example) -> tuple[bool, int, int]:
    """By what rows share a batch: how they are scored, how many candidates they have, and their length."""
    return example.single, len(example.continuations), example.row


def batches(
    examples: Examples, size: int, *, tokens: float = math.inf, order: Sequence[int] | None = None
) -> Iterator[tuple[list[int], Batch]]:
    """(indices, batch) pairs of at most `size` examples and, of more than one example, `tokens` with those padded.
    Without `order`, examples of like length share a batch, so that little is padded.

    Examples in a batch have the same number of candidates and the same way of scoring.
    """
    likeness = [_likeness(example) for example in examples]
    kind = [each[:2] for each in likeness]
    indices = list(order) if order is not None else sorted(range(len(examples)), key=likeness.__getitem__)
    start = 0
    while start < len(indices):
        stop, first = start + 1, examples[indices[start]]
        longest = first.length
        while stop < len(indices) and stop - start < size and kind[indices[stop]] == kind[indices[start]]:
            longest = max(longest, examples[indices[stop]].length)
            if (stop + 1 - start) * first.sequences * longest > tokens:
                break
            stop += 1
        chosen = indices[start:stop]
        yield chosen, collate(examples.take(chosen))
        start = stop


def collate(examples: Examples) -> Batch:
    """One left-padded batch; pad positions are masked and their token is 0."""
    tokens = _padded([e.prompt if e.single else e.prompt + sum(e.continuations, ()) for e in examples])
    mask = _padded([[1] * example.row for example in examples])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    answer = branch = target = source = None
    if examples[0].single:
        answer = torch.tensor([[tokens[0] for tokens in example.continuations] for example in examples])
    else:
        longest = max(len(tokens) for example in examples for tokens in example.continuations)
        target = torch.full((len(examples), len(examples[0].continuations), longest), -100)
        source = torch.zeros_like(target)
        branch = torch.zeros_like(tokens)
        for row, example in enumerate(examples):
            start = -sum(map(len, example.continuations))  # of a continuation, from the row's end
            prompt = start - 1  # its last position
            source[row] = prompt
            for c, continuation in enumerate(example.continuations):
                count = len(continuation)
                target[row, c, :count] = torch.tensor(continuation)
                source[row, c, 1:count] = torch.arange(start, start + count - 1)
                own = torch.arange(start, start + count)
                branch[row, own] = c + 1
                positions[row, own] = len(example.prompt) + torch.arange(count)
                start += count
        branch = branch if target.shape[1] > 1 else None
    label = torch.tensor([example.label for example in examples])
    spreads = [example.spread for example in examples if example.spread is not None]
    spread = torch.stack(spreads) if len(spreads) == len(examples) else None
    return Batch(tokens, mask, positions, answer, branch, target, source, label, examples.scoring, spread)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """[S, T], zeros on the left."""
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
