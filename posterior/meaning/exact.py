"""Short answers mean the same if they are equal up to case, punctuation, articles and white space, as SQuAD compares
answers (Rajpurkar et al. 2016). Two marks stay: the point between two digits (1.5 is not 15) and the minus of a number
(-5 is not 5)."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
MARKS = re.compile(r"(?<=\d)\.(?=\d)|(?<!\w)-(?=\d)")


def exact(texts: Sequence[str]) -> list[int]:
    """As Grouping."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(normalised(text), len(numbers)) for text in texts]


def normalised(text: str) -> str:
    """The text without what makes no difference. What would leave nothing is left out: "A" is an answer, and no
    article; "+" is one too."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    kept = {match.start() for match in MARKS.finditer(plain)}
    bare = "".join(c for place, c in enumerate(plain) if place in kept or not _is_punctuation(c))
    return _spaced(ARTICLES.sub(" ", bare)) or _spaced(bare) or _spaced(plain)


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _spaced(text: str) -> str:
    """The words with one blank between two."""
    return " ".join(text.split())
