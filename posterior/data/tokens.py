"""Text as token ids, whatever a tokenizer's own habits are: prompts, and what continues them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol

from posterior.errors import PosteriorError


class Tokenizer(Protocol):
    """What we use of a Hugging Face tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def __hash__(self) -> int: ...


ANCHORS = ("\n", ":", ".", "a", "0", "。")  # texts that may stand before another without becoming one token with it


def check(text: str, what: str = "the text") -> str:
    """The text itself. Raises PosteriorError where it is no whole text: half of a character has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise PosteriorError(
            f"{what} holds {half!r}, half of a character or a byte that is not UTF-8; write it in UTF-8"
        ) from None
    return text


def prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a prompt: with BOS where the tokenizer adds it, never with the EOS that some add, which would say
    that nothing follows."""
    return _without_end(tokenizer, text, list(tokenizer.encode(check(text))))


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of the text alone, without a BOS or EOS that it does not spell."""
    ids = _without_end(tokenizer, text, list(tokenizer.encode(check(text), add_special_tokens=False)))
    start = getattr(tokenizer, "bos_token_id", None)
    if start is not None and ids[:1] == [start] and not text.startswith(str(getattr(tokenizer, "bos_token", ""))):
        return ids[1:]
    return ids


def continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids that continue any prompt by exactly this text.

    Tokenizers of the sentencepiece family put a space before what they take for a text's start: " yes" alone would
    continue a prompt by two spaces, and "yes" by one. There the ids are those after an anchor. Where a tokenizer has no
    such habit, they are those of the text alone. Raises PosteriorError for a text that the tokenizer cannot give back.
    """
    alone = plain(tokenizer, text)
    found = alone
    for anchor in ANCHORS:
        before = plain(tokenizer, anchor)
        start = _decoded(tokenizer, before)
        if not start.endswith(anchor):
            continue
        joint = plain(tokenizer, anchor + text)
        for ids in (alone, joint[len(before) :] if joint[: len(before)] == before else alone):
            found = ids
            if _same(_decoded(tokenizer, [*before, *ids]), start + text):
                return ids
    raise PosteriorError(
        f"the base's tokenizer cannot continue a prompt by {text!r}: it gives {_decoded(tokenizer, found)!r} back; "
        "write it as the tokenizer does"
    )


def _without_end(tokenizer: Tokenizer, text: str, ids: list[int]) -> list[int]:
    """The ids without an EOS at their end that the text does not spell."""
    end = getattr(tokenizer, "eos_token_id", None)
    spelled = text.endswith(str(getattr(tokenizer, "eos_token", None) or "\0"))
    return ids[:-1] if end is not None and ids[-1:] == [end] and not spelled else ids


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _same(one: str, other: str) -> bool:
    """Equal, but for how accents are composed, which many tokenizers normalise."""
    return one == other or unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)
