"""Which short answers are the same."""

from __future__ import annotations

import pytest

from posterior.meaning.exact import exact, normalised

SAME = [
    ("Paris", " paris.", "The PARIS!", "“Paris”", "paris\n"),
    ("Martin Luther King, Jr.", "martin luther king jr"),
    ("1,000 people", "1000 people."),
    ("ﬁve", "five", "FIVE"),
    ("straße", "STRASSE"),
    ("a  dog and the cat", "dog and cat"),
    ("हिन्दी", "हिन्दी।"),
]
OTHER = [
    ("1.5", "15", "-1.5", "-15"),
    ("A", "B", "the", "an"),
    ("+", "-", "", "?"),
    ("👍", "👎"),
    ("another", "other"),
    ("हिन्दी", "हन्द"),
]


@pytest.mark.parametrize("texts", SAME, ids=lambda texts: texts[0])
def test_what_makes_no_difference(texts: tuple[str, ...]) -> None:
    assert exact(texts) == [0] * len(texts), [normalised(text) for text in texts]


@pytest.mark.parametrize("texts", OTHER, ids=lambda texts: texts[0])
def test_what_makes_one(texts: tuple[str, ...]) -> None:
    assert exact(texts) == list(range(len(texts))), [normalised(text) for text in texts]


def test_numbers_are_in_the_order_of_appearance() -> None:
    assert exact(["b", "a b", "a c", "b!", "c", "d"]) == [0, 0, 1, 0, 1, 2]
    assert exact([]) == []
