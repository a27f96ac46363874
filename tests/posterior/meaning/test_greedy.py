"""Groups by comparisons with the first text of each."""

from __future__ import annotations

import random
from collections.abc import Sequence

from posterior.meaning import Comparison
from posterior.meaning.greedy import Groups, grouped


def comparison(same: set[tuple[str, str]], compared: list[tuple[str, str]]) -> Comparison:
    """One that holds for these pairs, and notes what it compares."""

    def compare(question: str, text: str, others: Sequence[str]) -> list[bool]:
        assert question == "why?"
        pairs = [(text, other) for other in others]
        compared.extend(pairs)
        return [pair in same for pair in pairs]

    return compare


def one_by_one(texts: Sequence[str], same: set[tuple[str, str]]) -> list[int]:
    """Each text, in order, joins the first group whose first text it is the same as."""
    firsts: list[str] = []
    numbers = []
    for text in texts:
        joined = [n for n, first in enumerate(firsts) if first == text or (first, text) in same]
        numbers.append(joined[0] if joined else len(firsts))
        if not joined:
            firsts.append(text)
    return numbers


def test_rounds_give_what_texts_one_by_one_give() -> None:
    """Also where "the same" is neither symmetric nor transitive, as a model's is."""
    draw = random.Random(0)
    for _ in range(200):
        names = [f"t{n}" for n in range(draw.randint(1, 7))]
        same = {(a, b) for a in names for b in names if draw.random() < 0.3}
        texts = draw.choices(names, k=draw.randint(1, 9))
        compared: list[tuple[str, str]] = []
        numbers = grouped("why?", texts, comparison(same, compared))
        assert numbers == one_by_one(texts, same)
        assert len(set(compared)) == len(compared) <= (max(numbers) + 1) * len(set(texts))


def test_a_later_text_does_not_change_the_groups_before_it() -> None:
    same = {("a", "c"), ("b", "c"), ("c", "a"), ("c", "b")}
    assert one_by_one(["a", "b", "c"], same) == [0, 1, 0]
    assert grouped("why?", ["a", "b", "c"], comparison(same, [])) == [0, 1, 0]
    assert grouped("why?", ["a", "b"], comparison(same, [])) == [0, 1]


def test_white_space_makes_no_difference_and_is_not_compared() -> None:
    groups = Groups([" New  York", "New York\n", "new york", ""])
    assert (groups.first, groups.others) == ("New York", ["new york", ""])
    groups.join([False, True])
    assert (groups.first, groups.others, groups.numbers) == ("new york", [], [0, 0, 1, 0])
    assert (Groups([]).numbers, Groups([]).others) == ([], [])
