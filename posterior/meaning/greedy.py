"""Texts in groups, by comparisons of two: a text joins the first group whose first text means the same, as in semantic
entropy (Kuhn et al. 2023, arXiv 2302.09664, algorithm 1).

What comes later does not change the groups of what came before. The comparisons with one group's first text do not
depend on each other, so they are one round: n texts of m meanings take m rounds, and at most m n comparisons. Texts
that are equal up to white space are one text.
"""

from __future__ import annotations

from collections.abc import Sequence

from posterior.meaning import Comparison


class Groups:
    """Texts on their way into groups.

    first: the text that the newest group began with; others: the texts that are to be compared with it, none if every
    text has its group.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = [" ".join(text.split()) for text in texts]
        self._number: dict[str, int] = {}
        self._groups = 0
        self._open(list(dict.fromkeys(self._texts)))

    def _open(self, texts: list[str]) -> None:
        """A new group begins with the first of the texts that have none."""
        self.first, self.others = texts[0] if texts else "", texts[1:]
        if texts:
            self._number[self.first] = self._groups
            self._groups += 1

    def join(self, same: Sequence[bool]) -> None:
        """Those of the others that mean the same as the first are in its group."""
        number, left = self._number[self.first], []
        for text, joins in zip(self.others, same, strict=True):
            if joins:
                self._number[text] = number
            else:
                left.append(text)
        self._open(left)

    @property
    def numbers(self) -> list[int]:
        """The group of each text, from 0 in the order in which they first appear."""
        return [self._number[text] for text in self._texts]


def grouped(question: str, texts: Sequence[str], compare: Comparison) -> list[int]:
    """The number of each text's meaning, as Grouping has it."""
    groups = Groups(texts)
    while groups.others:
        groups.join(compare(question, groups.first, groups.others))
    return groups.numbers
