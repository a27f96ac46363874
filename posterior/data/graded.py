"""Rows that calibrate text: a prompt, and either the answers that are accepted or an answer that was graded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posterior.data import chat, tokens
from posterior.data.reading import Row
from posterior.data.task import Task, Tokenizer
from posterior.errors import PosteriorError

HELP = (
    "rows of `prompt` (or `messages`, or the fields of a text posterior's template) with `answers` (the list of those "
    "that are accepted), or with `answer` and `correct` (true or false)"
)


@dataclass(frozen=True)
class GradedRow:
    """prompt: token ids; question: the prompt in words; accepted: the answers that count as right, for a text that is
    still to be written; given: a text that was, and whether it is right. One of the two is None."""

    prompt: tuple[int, ...]
    question: str
    accepted: tuple[str, ...] | None
    given: tuple[str, bool] | None


def encode(task: Task, tokenizer: Tokenizer, rows: Sequence[Row], *, source: str = "") -> list[GradedRow]:
    """All rows, which have accepted answers all of them or none. The error names the row. Raises PosteriorError."""
    found: list[GradedRow] = []
    where = f"{source}, row" if source else "row"
    for number, row in enumerate(rows, 1):
        try:
            one = _row(task, tokenizer, row)
            if found and (found[0].given is None) != (one.given is None):
                raise PosteriorError("some rows have accepted 'answers' and some a graded 'answer'; use two files")
        except PosteriorError as error:
            raise PosteriorError(f"{where} {number}: {error}") from None
        found.append(one)
    return found


def _row(task: Task, tokenizer: Tokenizer, row: Row) -> GradedRow:
    answers, answer, correct = row.get("answers"), row.get("answer"), row.get("correct")
    accepted = given = None
    if answers is not None and answer is None and correct is None:
        if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one for one in answers):
            raise PosteriorError(f"'answers' must be a list of at least one text, not {answers!r:.60}")
        accepted = tuple(answers)
    elif answers is None and isinstance(answer, str) and answer and isinstance(correct, bool):
        given = (answer, correct)
    else:
        raise PosteriorError(
            "a row needs 'answers', a list of the texts that are accepted, or 'answer', a text, with 'correct', true "
            "or false"
        )
    prompt, question = _prompt(task, tokenizer, row)
    if not prompt:
        raise PosteriorError("the prompt is empty")
    return GradedRow(tuple(prompt), question, accepted, given)


def _prompt(task: Task, tokenizer: Tokenizer, row: Row) -> tuple[list[int], str]:
    """Token ids and words of the prompt: messages by the base's chat template, the fields of a text posterior by its
    own, else `prompt` as it is."""
    if "messages" in row:
        messages = row["messages"]
        ids = chat.chat_ids(tokenizer, messages, row.get("tools"))
        return ids, "\n".join(chat.texts("the last message", messages[-1].get("content")))
    if task.kind == "text":
        return task.prompt_ids(tokenizer, row), task.render(row)
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise PosteriorError("no 'prompt', which must be a text; or give 'messages'")
    return tokens.prompt(tokenizer, prompt), prompt
