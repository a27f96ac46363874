"""Which texts mean the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

THRESHOLD = 0.7  # cosine of embeddings from which texts mean the same; for all-MiniLM-L6-v2, by benchmarks/meaning.py


class Grouping(Protocol):
    """A way to tell meanings apart that sees all texts at once."""

    def __call__(self, texts: Sequence[str]) -> list[int]:
        """The number of each text's meaning; meanings are numbered from 0 in the order in which they first appear."""
        ...


class Comparison(Protocol):
    """A way to tell meanings apart that compares two texts at a time (posterior/meaning/greedy.py groups by it)."""

    def __call__(self, question: str, text: str, others: Sequence[str]) -> list[bool]:
        """Whether each of the others means the same as the text, as answers to the question ("": to none)."""
        ...
