"""Where the values of a JSON text stand, and which tokens spell them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posterior.models.base import load_tokenizer, resolve
from server.services.leaves import HALF, leaves, spelled
from tests.posterior.tokenizers_of_kinds import KINDS, make
from tests.server import fakes

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4))
MIXED = ' {"a/b": {"~": "é\\n\\"x\\u00e9\\ud83d\\ude00"},\n"日本": [[], {}, [1.5e-3 , -0, true], "" ] , "n":null}\n'


def walked(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The leaves of what Python's reader makes of a text."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from walked(each, (*path, key))
    else:
        yield path, value


def test_a_text_with_escapes_arrays_other_letters_and_white_space() -> None:
    found = leaves(MIXED)
    assert [(leaf.pointer, leaf.value, MIXED[leaf.start : leaf.end]) for leaf in found] == [
        ("/a~1b/~0", 'é\n"xé😀', '"é\\n\\"x\\u00e9\\ud83d\\ude00"'),
        ("/日本/2/0", 0.0015, "1.5e-3"),
        ("/日本/2/1", 0, "-0"),
        ("/日本/2/2", True, "true"),
        ("/日本/3", "", '""'),
        ("/n", None, "null"),
    ]


@given(JSON, st.booleans(), st.sampled_from([None, 0, 2]))
@settings(deadline=None, max_examples=200, database=None)
def test_every_leaf_is_what_a_reader_finds(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    found = leaves(text)
    assert [(leaf.path, leaf.value) for leaf in found] == list(walked(json.loads(text)))
    assert [json.loads(text[leaf.start : leaf.end]) for leaf in found] == [leaf.value for leaf in found]


def test_of_a_text_that_breaks_off_the_complete_leaves_are_listed() -> None:
    whole = leaves(MIXED)
    for length in range(len(MIXED)):
        part = MIXED[:length]
        ended = [leaf for leaf in whole if leaf.end <= length]
        found = leaves(part)
        assert found[: len(ended)] == ended
        assert all(leaf.end == length and part[-1].isdigit() for leaf in found[len(ended) :]), "a number may go on"


@pytest.mark.parametrize("text", ["", "hello", "]", ":1", '{"a": tru', "01", '"\\q"', '"a\nb"', "NaN"])
def test_what_is_no_json_has_no_leaves(text: str) -> None:
    assert leaves(text) == []


def test_what_follows_a_whole_value_belongs_to_nothing() -> None:
    assert [leaf.pointer for leaf in leaves('{"a": 1} {"b": 2}')] == ["/a"]
    assert [leaf.value for leaf in leaves("1 2")] == [1]


def test_values_are_such_that_json_in_utf8_can_say_them() -> None:
    digits = "9" * 5000
    values = [leaf.value for leaf in leaves(f'["\\ud800x", 1e999, -1e999, {digits}, 1e2]')]
    assert values == ["\ufffdx", "1e999", "-1e999", digits, 100.0]
    assert json.dumps(values, allow_nan=False, ensure_ascii=False).encode()
    assert leaves('{"\\udfff": 1}')[0].pointer == "/\ufffd"


def test_leaves_within_very_many_others_are_left_out() -> None:
    deep = "[" * 9000 + "1" + "]" * 9000
    assert [leaf.pointer for leaf in leaves(f"[{deep}, 2, {'[' * 63}3{']' * 63}]")] == ["/1", "/2" + "/0" * 63]


# Tokens


class Pieces(fakes.Tokenizer):
    """A tokenizer whose tokens are the bytes that a text is cut into; one without bytes is special."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, token_ids: Sequence[int], **_: Any) -> str:
        return b"".join(self.pieces[token] for token in token_ids).decode(errors="replace")


def cut(text: str, chance: random.Random) -> list[bytes]:
    """The bytes of a text in pieces of 1 to 5, then a special token."""
    data, pieces = text.encode(), []
    while data:
        size = chance.randint(1, 5)
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, b""]


@pytest.mark.parametrize("number", range(30))
def test_each_token_holds_the_characters_of_its_bytes(number: int) -> None:
    text = MIXED + "ﬁ日本語é😀x😀é"
    pieces = cut(text, random.Random(number))
    character = [i for i, each in enumerate(text) for _ in each.encode()]  # of each byte
    found = spelled(Pieces(pieces), range(len(pieces)))
    assert found.text == text
    begin = 0
    for piece, start, end in zip(pieces, found.starts, found.ends, strict=True):
        if piece:
            assert (start, end) == (character[begin], character[begin + len(piece) - 1] + 1)
        else:
            assert start == end
        begin += len(piece)


def test_a_text_that_breaks_off_within_a_character() -> None:
    pieces = ['{"a": "é'.encode(), "日".encode()[:2]]
    found = spelled(Pieces(pieces), [0, 1])
    assert (found.text, found.starts, found.ends) == ('{"a": "é', [0, 8], [8, 9])


def test_the_sign_for_broken_bytes_may_stand_in_a_text() -> None:
    text = f'["{HALF}", "{HALF}{HALF}a"]'
    pieces = [each.encode() for each in text]
    found = spelled(Pieces(pieces), range(len(pieces)))
    assert found.text == text and found.ends == sorted(found.ends)
    assert [leaf.value for leaf in leaves(found.text)] == [HALF, HALF + HALF + "a"]
    assert found.holding(len(text) - 1, len(text)) == (len(text) - 1, len(text))


@pytest.mark.parametrize("kind", [*KINDS, "the default base"])
def test_tokenizers_of_every_habit(kind: str) -> None:
    tokenizer = load_tokenizer(resolve()) if kind == "the default base" else make(kind)
    ids = list(tokenizer.encode('{"b": "ab  a é日", "c": [ 12, true]}', add_special_tokens=False))
    found = spelled(tokenizer, ids)
    assert found.text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    for leaf in leaves(found.text):
        held = found.holding(leaf.start, leaf.end)
        assert held is not None
        start, stop = held
        assert found.text[leaf.start : leaf.end] in tokenizer.decode(
            ids[start:stop], clean_up_tokenization_spaces=False
        )
        assert found.ends[start] > leaf.start and found.ends[stop - 1] >= leaf.end
        assert start == 0 or found.ends[start - 1] <= leaf.start
        assert stop - 1 == start or found.ends[stop - 2] < leaf.end
    assert [leaf.value for leaf in leaves(found.text)] == ["ab  a é日", 12, True]


def test_the_end_of_a_number_that_ends_the_text_is_a_special_token() -> None:
    ended = spelled(Pieces([b"1", b"2", b""]), [0, 1, 2])
    assert ended.holding(0, 3) == (0, 3) and ended.holding(0, 2) == (0, 2)
    assert spelled(Pieces([b"1", b"2"]), [0, 1]).holding(0, 3) is None
