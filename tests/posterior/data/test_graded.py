"""Rows that calibrate text."""

from __future__ import annotations

from typing import Any

import pytest

from posterior.data.graded import encode
from posterior.data.task import Task
from posterior.errors import PosteriorError
from tests.server.fakes import Tokenizer

CHOICE = Task("choice", "{text}\nSentiment:", (" negative", " positive"))
TEXT = Task("text", "Q: {prompt}\nA:")


def test_prompts_are_put_as_the_posterior_was_fitted_or_as_they_are() -> None:
    row = {"prompt": "who?", "answers": ["me", "you"]}
    (one,) = encode(CHOICE, Tokenizer(), [row])
    assert (bytes(one.prompt), one.question, one.accepted, one.given) == (b"who?", "who?", ("me", "you"), None)
    (one,) = encode(TEXT, Tokenizer(), [row])
    assert (bytes(one.prompt), one.question) == (b"Q: who?\nA:", "Q: who?\nA:")
    (one,) = encode(TEXT, Tokenizer(), [{"messages": [{"role": "user", "content": "who?"}], "answers": ["me"]}])
    assert (bytes(one.prompt), one.question) == (b"user: who?\nassistant:", "who?")
    (one,) = encode(CHOICE, Tokenizer(), [{"prompt": "who?", "answer": " me", "correct": False}])
    assert (one.accepted, one.given) == (None, (" me", False))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "x"}], "row 1: a row needs 'answers'"),
        ([{"prompt": "x", "answer": "y"}], "row 1: a row needs 'answers'"),
        ([{"prompt": "x", "answer": "", "correct": True}], "a row needs"),
        ([{"prompt": "x", "answer": "y", "correct": 1}], "a row needs"),
        ([{"prompt": "x", "answers": ["y"], "answer": "y", "correct": True}], "a row needs"),
        ([{"prompt": "x", "answers": []}], "'answers' must be a list of at least one text"),
        ([{"prompt": "x", "answers": "y"}], "'answers' must be a list"),
        ([{"answers": ["y"]}], "no 'prompt'"),
        ([{"prompt": 3, "answers": ["y"]}], "no 'prompt'"),
        ([{"messages": [], "answers": ["y"]}], "at least one message"),
        ([{"messages": [{"role": "tool", "content": "x"}], "answers": ["y"]}], "chat template"),
        (
            [{"prompt": "x", "answers": ["y"]}, {"prompt": "x", "answer": "y", "correct": True}],
            "row 2: some rows have accepted 'answers' and some a graded 'answer'",
        ),
    ],
)
def test_a_bad_row_is_named(rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(PosteriorError, match=said):
        encode(CHOICE, Tokenizer(), rows)


def test_a_template_without_its_fields_is_refused() -> None:
    with pytest.raises(PosteriorError, match="rows.jsonl, row 1: field 'prompt' is missing"):
        encode(TEXT, Tokenizer(), [{"question": "x", "answers": ["y"]}], source="rows.jsonl")
