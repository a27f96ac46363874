"""Prompts and what continues them, on tokenizers of every habit."""

from __future__ import annotations

import pytest
from tokenizers import normalizers

from posterior.data import candidates, tokens
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.models.base import load_tokenizer, resolve
from tests.posterior.tokenizers_of_kinds import EDGES, KINDS, make

ANSWERS = (
    " a",
    "a",
    " ab",
    "b",
    "  a",
    " ",
    "\n",
    "\na",
    "a b",
    "é",
    " é",
    "a</s>",
    "日本",
    " 日本",
    "\ta",
    "a ",
    ".",
    " .",
)


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_continues_the_prompt_by_exactly_its_text(kind: str, edges: str) -> None:
    tokenizer = make(kind, edges)
    for text in ("b:", "a", "a\n", "b ab:"):
        prompt = tokens.prompt(tokenizer, text)
        start = tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        for answer in ANSWERS:
            ids = tokens.continuation(tokenizer, answer)
            assert tokenizer.decode([*prompt, *ids], clean_up_tokenization_spaces=False) == start + answer, (
                text,
                answer,
            )
            assert 0 not in ids and (1 in ids) == ("</s>" in answer)
        assert (prompt[0] == 0) == (edges in ("bos", "both")) and prompt[-1] != 1 and 0 not in prompt[1:]


def test_the_ids_after_a_sentencepiece_prompt_are_those_of_the_whole_text() -> None:
    for kind in ("always", "first", "never", "legacy"):
        tokenizer = make(kind)
        whole = tokenizer.encode("b:\n ab")
        assert tokens.prompt(tokenizer, "b:\n") + tokens.continuation(tokenizer, " ab") == whole
        assert tokens.continuation(tokenizer, " ab") == [tokenizer.convert_tokens_to_ids("\u2581ab")]
        assert tokens.continuation(tokenizer, "ab") == [tokenizer.convert_tokens_to_ids("ab")]


@pytest.mark.parametrize("edges", EDGES)
def test_byte_level_ids_are_those_of_the_text_alone(edges: str) -> None:
    """Of tokenizers like GPT-2's, Llama 3's and the default base's: posteriors are bound to them."""
    tokenizer = make("byte-level", edges)
    for answer in ANSWERS:
        assert tokens.continuation(tokenizer, answer) == tokenizer.encode(answer, add_special_tokens=False)


def test_the_default_base_s_ids_are_as_ever() -> None:
    tokenizer = load_tokenizer(resolve())
    for answer in (
        *ANSWERS,
        " negative",
        " positive",
        " A.",
        "1 2024",
        "I'm",
        " <|im_end|>",
        "\r\n",
        "e\u0301",
        "\u00a0x",
    ):
        assert tokens.continuation(tokenizer, answer) == tokenizer.encode(answer, add_special_tokens=False)
        assert tokens.prompt(tokenizer, answer) == tokenizer.encode(answer)


def test_a_text_that_spells_bos_or_eos_keeps_it() -> None:
    tokenizer = make("byte-level")
    assert tokens.prompt(tokenizer, "<s>a</s>") == tokens.plain(tokenizer, "<s>a</s>") == tokenizer.encode("<s>a</s>")
    assert tokens.prompt(tokenizer, "<s>a</s>")[0] == 0 and tokens.prompt(tokenizer, "<s>a</s>")[-1] == 1


def test_candidates_and_prompts_use_it() -> None:
    tokenizer = make("always", "both")
    task = Task("choice", "{text}:", (" a", " b"))
    assert task.prompt_ids(tokenizer, {"text": "c"})[0] == 0 and task.prompt_ids(tokenizer, {"text": "c"})[-1] != 1
    assert candidates.encode(tokenizer, (" a", " b")) == tuple(
        (tokenizer.convert_tokens_to_ids(piece),) for piece in ("\u2581a", "\u2581b")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_s_tokens_are_remembered_and_no_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ids as without a memory, whichever tokenizer was asked first, and a long answer is not kept."""
    tokenizer, long = make(kind), "b" * (candidates.LONGEST_KEPT + 1)
    answers = (*dict.fromkeys(" " + answer.strip() for answer in ANSWERS if answer.strip()), long)
    for other in KINDS:
        candidates.encode(make(other), answers)
    expected = tuple(tuple(tokens.continuation(tokenizer, answer)) for answer in answers)
    assert candidates.encode(tokenizer, answers) == expected
    read: list[str] = []
    monkeypatch.setattr(
        "posterior.data.candidates.continuation",
        lambda tokenizer, text: read.append(text) or tokens.continuation(tokenizer, text),
    )
    assert candidates.encode(tokenizer, answers[::-1]) == expected[::-1] and read == [long]


def test_what_cannot_be_continued_is_one_line() -> None:
    lower = make("byte-level")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(
        PosteriorError, match=r"cannot continue a prompt by ' Yes': it gives '\\n yes' back|gives '.* yes' back"
    ):
        candidates.encode(lower, (" Yes", " No"))
    assert len(candidates.encode(lower, (" yes", " no"))) == 2


@pytest.mark.parametrize("text", ["\ud83d", "a\udce9", "\udc00b"])
def test_half_a_character_is_one_line(text: str) -> None:
    tokenizer = make("byte-level")
    for use in (tokens.prompt, tokens.plain, tokens.continuation):
        with pytest.raises(PosteriorError, match="half of a character"):
            use(tokenizer, text)
    with pytest.raises(PosteriorError, match="half of a character"):
        Task("choice", "{text}:" + text)
    with pytest.raises(PosteriorError, match="half of a character"):
        Task("choice", "{text}:", (" a", text))
