"""Whether a text is one of the answers that are accepted.

match: it means the same as one of them, by posterior/meaning/exact.py. f1: it has enough words in common with one, as
SQuAD counts them (Rajpurkar et al. 2016).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from posterior.meaning.exact import normalised

ENOUGH = 0.5  # of F1: more words in common than not


def match(text: str, accepted: Sequence[str]) -> bool:
    """Whether the text is one of them, up to case, punctuation, articles and white space."""
    own = normalised(text)
    return any(own == normalised(one) for one in accepted)


def f1(text: str, accepted: Sequence[str]) -> float:
    """The best F1 of the words of the text and of one of them, between 0 and 1."""
    own = normalised(text).split()
    return max(_f1(own, normalised(one).split()) for one in accepted)


def _f1(own: Sequence[str], other: Sequence[str]) -> float:
    common = sum((Counter(own) & Counter(other)).values())
    return 2 * common / (len(own) + len(other)) if common else 0.0
