"""Candidate answers as token sequences that continue a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from posterior.data.tokens import Tokenizer, continuation
from posterior.errors import PosteriorError

MAX_CANDIDATES = 255  # as OpenAI's decisions have it
KEPT, LONGEST_KEPT = 8192, 128  # answers whose tokens are remembered, and characters of one: some 40 MB at the most

Candidates = tuple[tuple[int, ...], ...]


def encode(tokenizer: Tokenizer, answers: Sequence[str]) -> Candidates:
    """Token ids of each answer, to be appended to a prompt's token ids exactly as they are.

    A leading space belongs to the answer: after "Sentiment:" the candidate is " positive". Raises PosteriorError for
    fewer than 2 or more than 255 answers, an answer without tokens or that the tokenizer cannot give back, or two that
    tokenise alike.
    """
    if not 2 <= len(answers) <= MAX_CANDIDATES:
        raise PosteriorError(f"{len(answers)} candidate answers given; a choice needs 2 to {MAX_CANDIDATES}")
    seen: dict[tuple[int, ...], str] = {}
    for answer in answers:
        tokens = _tokens(tokenizer, answer)
        if not tokens:
            raise PosteriorError(f"candidate answer {answer!r} has no tokens; remove it")
        if tokens in seen:
            raise PosteriorError(f"candidate answers {seen[tokens]!r} and {answer!r} tokenise alike; make them differ")
        seen[tokens] = answer
    return tuple(seen)


def _tokens(tokenizer: Tokenizer, answer: str) -> tuple[int, ...]:
    """Token ids of an answer; requests and rows bring the same ones again and again. Raises PosteriorError."""
    return _remembered(tokenizer, answer) if len(answer) <= LONGEST_KEPT else _encoded(tokenizer, answer)


def _encoded(tokenizer: Tokenizer, answer: str) -> tuple[int, ...]:
    return tuple(continuation(tokenizer, answer)) if answer else ()


_remembered = lru_cache(KEPT)(_encoded)


def single_token(candidates: Candidates) -> bool:
    """True when every candidate is one token, so that one forward pass of the prompt scores them all."""
    return all(len(tokens) == 1 for tokens in candidates)
