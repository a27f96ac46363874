"""Which texts count as an accepted answer."""

from __future__ import annotations

import pytest

from posterior.meaning.grades import f1, match

ACCEPTED = ("Jaxon Bieber", "New York City")


@pytest.mark.parametrize(
    ("text", "right"),
    [(" jaxon bieber.", True), ("The New York City", True), ("New York", False), ("Jaxon Bieber or others", False)],
)
def test_match_is_equality_up_to_what_makes_no_difference(text: str, right: bool) -> None:
    assert match(text, ACCEPTED) is right


@pytest.mark.parametrize(
    ("text", "score"),
    [("New York", 0.8), ("Jaxon", 2 / 3), ("york york city", 2 / 3), ("Paris", 0.0), ("the", 0.0), ("", 0.0)],
)
def test_f1_counts_words_in_common_with_the_best_answer(text: str, score: float) -> None:
    """2 common / (own + accepted): "york york city" has 2 of 3 words in common with 3."""
    assert f1(text, ACCEPTED) == pytest.approx(score)
