"""The leaves of a JSON text (its strings, numbers, true, false and null), and the tokens that spell each of them."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from posterior.data.tokens import Tokenizer

Scalar = str | int | float | bool | None
Path = tuple[str | int, ...]

PART = re.compile(
    r"""[ \t\n\r]*(?:
        (?P<mark> [\[\]{},:])
      | (?P<string> "(?: [^"\\\x00-\x1f] | \\["\\/bfnrt] | \\u[0-9a-fA-F]{4} )*" )
      | (?P<number> -?(?:0|[1-9]\d*) (?:\.\d+)? (?:[eE][+-]?\d+)? (?= [ \t\n\r,\]}] | \Z) )
      | (?P<word> true | false | null )
    )""",
    re.VERBOSE | re.ASCII,
)
MAX_DEPTH = 64  # of a leaf; paths to deeper ones would be most of a reply
HALF = "\ufffd"  # what tokenizers give for bytes that are no whole character yet


@dataclass(frozen=True)
class Leaf:
    """A leaf: the keys and numbers that lead to it, its value, and its place in the text, characters [start, end).

    A number that no finite double holds has its text for a value.
    """

    path: Path
    value: Scalar
    start: int
    end: int

    @property
    def pointer(self) -> str:
        """The path as a JSON pointer (RFC 6901)."""
        return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in self.path)


@dataclass(frozen=True)
class Spelled:
    """A text of T tokens. Token t holds all or some bytes of the characters [starts[t], ends[t]): none, if it is a
    special one."""

    text: str
    starts: list[int]
    ends: list[int]

    def holding(self, start: int, end: int) -> tuple[int, int] | None:
        """The tokens [first, stop) that hold any of the characters [start, end).

        `end` may be one beyond the text: there stands the special token that ends it. None if there is no such token.
        """
        stop = bisect_left(self.ends, min(end, len(self.text))) + 1 + (end > len(self.text))
        return (bisect_right(self.ends, start), stop) if stop <= len(self.ends) else None


def leaves(text: str) -> list[Leaf]:
    """The leaves of a JSON text, in order, but those within more than MAX_DEPTH objects and arrays.

    Of a text that breaks off: those that are complete. A number at the very end counts as complete.
    """
    found: list[Leaf] = []
    path: list[str | int] = []  # of each container that is open: the key or the number of what stands there
    position, key_follows = 0, False
    while (match := PART.match(text, position)) is not None:
        position, kind = match.end(), match.lastgroup or ""
        part = match[kind]
        if part in ("{", "["):
            path.append("" if part == "{" else 0)
            key_follows = part == "{"
        elif kind == "mark" and not path:
            break  # no JSON
        elif part in ("}", "]"):
            path.pop()
        elif part == ",":
            key_follows = isinstance(path[-1], str)
            path[-1] = "" if isinstance(path[-1], str) else path[-1] + 1
        elif part == ":":
            key_follows = False
        elif key_follows:
            path[-1] = str(_value(part))
        elif len(path) <= MAX_DEPTH:
            found.append(Leaf(tuple(path), _value(part), match.start(kind), position))
        if not path:
            break  # whatever follows belongs to nothing
    return found


def _value(part: str) -> Scalar:
    """The value of a leaf's text, such that JSON in UTF-8 can say it."""
    try:
        value: Scalar = json.loads(part)
    except ValueError:  # more digits than Python reads
        return part
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # "\\ud800" is half of a character
    return part if isinstance(value, float) and not math.isfinite(value) else value


def spelled(tokenizer: Tokenizer, tokens: Sequence[int]) -> Spelled:
    """The text of these tokens, without special ones, and which characters each of them holds.

    Tokens are decoded behind those of the piece before them, since what one gives may depend on where it stands.
    """
    text, starts, ends = "", [], []
    begin = read = 0  # tokens [begin, read) are the last piece of whole characters; `text` reaches up to `read`
    known, position = "", 0
    for count in range(1, len(tokens) + 1):
        now = str(
            tokenizer.decode(tokens[begin:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )  # of which `known` stands in `text`
        starts.append(position)
        whole = len(now.rstrip(HALF)) if now.endswith(HALF) else len(now)
        position = max(position, len(text) + whole - len(known))
        ends.append(position + now.endswith(HALF))
        if len(now) > len(known) and not now.endswith(HALF):
            text += now[len(known) :]
            begin, read = read, count
            known = str(
                tokenizer.decode(tokens[begin:read], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )
    return Spelled(text, starts, ends)
