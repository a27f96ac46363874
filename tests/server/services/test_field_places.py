"""Which tokens a value takes, and what is scored in its place, where tokens hold more than the value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from posterior.models.base import load_tokenizer, resolve
from server.services.fields import Place, _place
from server.services.leaves import Scalar, leaves, spelled


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(resolve())


def placed(tokenizer: Any, pieces: Sequence[str], values: tuple[Scalar, ...] | None) -> tuple[Place, list[str]]:
    """The place of the last leaf of these tokens, and the texts of its candidates."""
    ids = [token for piece in pieces for token in tokenizer.encode(piece)]
    assert len(ids) == len(pieces), "one token each"
    known = spelled(tokenizer, ids)
    place = _place(tokenizer, known, ids, leaves(known.text)[-1], values)
    assert place is not None
    return place, [tokenizer.decode(tokens) for tokens in place.candidates or ()]


@pytest.mark.parametrize(
    ("pieces", "values", "tokens", "candidates"),
    [
        (["[", '"', "bad", '"', "]"], ("good", "bad"), (2, 4), ['good"', 'bad"']),
        (["[", " ", '"', "bad", '"]'], ("good", "bad"), (3, 5), ['good"]', 'bad"]']),
        (['["', "bad", '",'], ("good", "bad"), (1, 3), ['good",', 'bad",']),
        (['["', "b", "ad", '",'], ("é", "bad"), (1, 4), ['é",', 'bad",']),
        (["[", '"', "bad", '",'], ("bad", None), (1, 4), ['"bad",', "null,"]),
        (["[", "true", "]"], (True, False), (1, 2), ["true", "false"]),
        (["[", "1", "],"], (1, 12, True), (1, 3), ["1],", "12],", "true],"]),
        (["[", '"', "bad", '"', "]"], None, (2, 4), []),
        (["[", "1", "2", "]"], None, (1, 4), []),
        (["[", '""', "]"], ("", "a"), (1, 2), ['""', '"a"']),
        (["[", "1", "]"], (1, 2.0, 0.5, 1e300), (1, 3), ["1]", "2]", "0.5]", "1e+300]"]),
    ],
)
def test_the_tokens_of_a_value(
    tokenizer: Any,
    pieces: list[str],
    values: tuple[Scalar, ...] | None,
    tokens: tuple[int, int],
    candidates: list[str],
) -> None:
    """What the first and the last token hold beside the value is the same for all candidates."""
    place, texts = placed(tokenizer, pieces, values)
    assert (place.start, place.stop) == tokens and texts == candidates


def test_a_value_may_be_written_in_its_own_way(tokenizer: Any) -> None:
    place, texts = placed(tokenizer, ["[", '"', "\\", "u", "0", "0", "6", "1", '"'], ("a", "b"))
    assert texts == ['\\u0061"', 'b"'] and place.own == 0
