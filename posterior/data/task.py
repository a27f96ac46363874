"""The task: how a row of the user's data becomes a prompt, and which answers it allows.

The template is part of the posterior. Served with another template, the same weights describe another distribution.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from posterior.data import decisions, tokens
from posterior.data.chat import chat_ids as chat_ids
from posterior.data.scoring import Scoring
from posterior.data.tokens import Tokenizer as Tokenizer
from posterior.errors import PosteriorError

Kind = Literal["choice", "decision", "text"]


@dataclass(frozen=True)
class Task:
    """One kind of question.

    kind: "choice" (one of some candidate answers), "decision" (typed questions, each row its own) or "text" (free
    text, from instruction data).
    template: text with {field} placeholders; "{text}\\nSentiment:" needs rows with a field "text". That of a decision
    has the fields of decisions.FIELDS.
    answers: the candidates of a choice task; None when every row brings its own `choices`.
    chat: send the rendered template as a user message through the base's chat template.
    scoring: how candidates are compared.
    labels: how a decision's options are put to the model, by their words or by letters.
    question: what a decision's rows are asked that bring none of their own.
    """

    kind: Kind
    template: str
    answers: tuple[str, ...] | None = None
    chat: bool = False
    scoring: Scoring = Scoring()
    labels: decisions.Labels = "words"
    question: decisions.Asked | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise PosteriorError(f"task kind {self.kind!r} is unknown; use one of {list(get_args(Kind))}")
        if self.labels not in get_args(decisions.Labels):
            raise PosteriorError(f"labels {self.labels!r} are unknown; use one of {list(get_args(decisions.Labels))}")
        for text in (self.template, *(self.answers or ())):
            tokens.check(text, f"the text {text!r}")
        if not self.fields:
            raise PosteriorError(
                f"the template {self.template!r} has no {{field}}; write for example '{{text}}\\nSentiment:'"
            )
        if self.kind == "text" and self.answers is not None:
            raise PosteriorError("a text task has no candidate answers; leave the answers out, or make it a choice")
        if self.kind == "decision":
            self._check_decision()

    def _check_decision(self) -> None:
        if self.answers is not None:
            raise PosteriorError("each question of a decision task brings its own options; leave the answers out")
        if not {"input", "question"} <= set(self.fields) <= set(decisions.FIELDS):
            raise PosteriorError(
                f"the template {self.template!r} of a decision needs {{input}} and {{question}}, and may have "
                f"{{options}}; for example {decisions.TEMPLATE!r}"
            )

    @property
    def has_candidates(self) -> bool:
        """Whether an answer is one of some, and not a text."""
        return self.kind != "text"

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the placeholders, in order of first use."""
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise PosteriorError(
                f"the template {self.template!r} is not valid: {error}; write {{{{ for a plain brace"
            ) from None
        names = [name for _, name, spec, conversion in parts if name is not None and not spec and not conversion]
        if len(names) != sum(part[1] is not None for part in parts) or not all(name.isidentifier() for name in names):
            raise PosteriorError(f"the template {self.template!r} may hold only plain {{name}} placeholders")
        return tuple(dict.fromkeys(names))

    def render(self, row: Mapping[str, Any], *, exact: bool = False) -> str:
        """The prompt text of one row. With `exact`, fields the template does not use are an error too."""
        missing = [name for name in self.fields if not isinstance(row.get(name), str)]
        if missing:
            raise PosteriorError(
                f"field {missing[0]!r} is missing or not a string; the template needs the fields {list(self.fields)}"
            )
        extra = sorted(set(row) - set(self.fields))
        if exact and extra:
            raise PosteriorError(f"unknown field {extra[0]!r}; the template needs the fields {list(self.fields)}")
        return self.template.format_map({name: row[name] for name in self.fields})

    def prompt_ids(self, tokenizer: Tokenizer, row: Mapping[str, Any], *, exact: bool = False) -> list[int]:
        """Token ids of the rendered prompt; a candidate's tokens follow them directly, those of a decision without
        thoughts ahead of them."""
        text = self.render(row, exact=exact)
        if self.chat:
            message = {"role": "user", "content": text}
            return chat_ids(tokenizer, [message], thinking=self.kind != "decision")
        return tokens.prompt(tokenizer, text)

    def ask(
        self, tokenizer: Tokenizer, input: Any, question: decisions.Asked, order: Sequence[int] | None = None
    ) -> tuple[list[int], tuple[str, ...]]:
        """Token ids of a decision's prompt, with its options in their own order or another, and the texts of the
        options in their own. Raises PosteriorError."""
        row = decisions.fields(input, question, self.labels, order)
        blank = "" if self.chat or self.template[-1:].isspace() else " "
        answers = tuple(blank + name for name in decisions.names(question, self.labels, order))
        return self.prompt_ids(tokenizer, {name: row[name] for name in self.fields}), answers

    def answers_of(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The candidates of a row in words. Raises PosteriorError for a decision's row without a question."""
        if self.kind != "decision":
            return self.answers or tuple(row["choices"])
        return tuple(option.words for option in self.question_of(row).options)

    def question_of(self, row: Mapping[str, Any]) -> decisions.Asked:
        """What a decision's row asks. Raises PosteriorError."""
        asked = row.get("question")
        question = self.question if asked is None else decisions.read(decisions.QUESTION, asked, "question")
        if question is None:
            raise PosteriorError("the row has no 'question', and the task none for all rows; give one of them")
        return question

    def to_json(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "kind": self.kind,
            "template": self.template,
            "answers": None if self.answers is None else list(self.answers),
            "chat": self.chat,
        }
        if self.scoring.tokens != "sum":  # as all did, and did not say, before there was another
            record["scores"] = self.scoring.tokens
        if self.scoring.scale != 1.0:
            record["scale"] = self.scoring.scale
        if self.kind == "decision":
            record["labels"] = self.labels
            record["question"] = None if self.question is None else self.question.model_dump(exclude_none=True)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Task:
        answers = record.get("answers")
        return cls(
            record["kind"],
            record["template"],
            None if answers is None else tuple(answers),
            bool(record.get("chat", False)),
            Scoring(record.get("scores", "sum"), record.get("scale", 1.0)),
            record.get("labels", "words"),
            decisions.read(decisions.QUESTION, asked, "question") if (asked := record.get("question")) else None,
        )
