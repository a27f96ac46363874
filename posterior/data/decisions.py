"""Typed questions about an input, in the form of OpenAI's POST /v1/decisions, and how a language model reads them.

A predicate asks how likely a statement is, a choice for one of 2 to 255 options, a score for one of 2 to 10 ordered
levels. Rows of a decision task and the server's requests have the same form. Whatever the kind, a question comes to
options: what an answer's value is, how the model writes it, and what stands in the prompt beside it.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictStr,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from posterior.errors import PosteriorError
from posterior.validation import complaint

MAX_QUESTIONS = 400  # a request
MAX_CHOICES, MAX_LEVELS = 255, 10
MAX_JSON_DEPTH, MAX_JSON_VALUES, MAX_JSON_BYTES = 32, 10_000, 256 * 2**10  # of an input_json part, as OpenAI has it

Value = StrictStr | StrictBool | int
Labels = Literal["words", "letters"]
Read = TypeVar("Read")

TEMPLATE = "{input}\n\n{question}\n{options}\nAnswer:"  # the input first: questions about it share what it costs
FIELDS = ("input", "question", "options")


class Option(NamedTuple):
    """value: what an answer says: a choice's own, true or false, or a level's number. words: how it is called."""

    value: Value
    words: str
    description: str = ""


class Form(BaseModel):
    """What requests and rows are made of: fields that nobody knows are an error, and types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Text(Form):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class Json(Form):
    type: Literal["input_json"]
    data: dict[str, Any] | list[dict[str, Any]]

    @field_validator("data")
    @classmethod
    def _within_bounds(cls, data: Any) -> Any:
        level: list[Any] = [data]
        values = depth = 0
        while level:
            values, depth = values + len(level), depth + any(isinstance(each, dict | list) for each in level)
            nested = [each for each in level if isinstance(each, dict | list)]
            level = [one for each in nested for one in (each.values() if isinstance(each, dict) else each)]
        if depth > MAX_JSON_DEPTH or values > MAX_JSON_VALUES or len(_compact(data).encode()) > MAX_JSON_BYTES:
            raise ValueError(
                f"JSON parts have at most {MAX_JSON_DEPTH} levels, {MAX_JSON_VALUES} values and {MAX_JSON_BYTES} bytes"
            )
        return data


class Image(Form):
    """Read so that it can be refused by name."""

    model_config = ConfigDict(extra="allow")

    type: Literal["input_image"]

    @model_validator(mode="after")
    def _refuse(self) -> Image:
        raise ValueError("images are not read here; describe them in an input_text part")


class Said(Form):
    type: Literal["output_text"]
    text: str


class Refusal(Form):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[Text | Json | Image, Field(discriminator="type")]
OutputPart = Annotated[Text | Image, Field(discriminator="type")]


class Message(Form):
    role: Literal["user", "developer", "system"]
    content: str | Annotated[list[Part], Field(min_length=1)]
    type: Literal["message"] = "message"


class Assistant(Form):
    role: Literal["assistant"]
    content: str | Annotated[list[Annotated[Said | Refusal, Field(discriminator="type")]], Field(min_length=1)]
    phase: Literal["commentary", "final_answer"] | None = None
    type: Literal["message"] = "message"


class Item(Form):
    call_id: str
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class FunctionCall(Item):
    type: Literal["function_call"]
    name: str
    arguments: str
    namespace: str | None = None


class CustomCall(Item):
    type: Literal["custom_tool_call"]
    name: str
    input: str
    namespace: str | None = None


class Output(Item):
    type: Literal["function_call_output", "custom_tool_call_output"]
    output: str | Annotated[list[OutputPart], Field(min_length=1)]


def _form(value: Any) -> str | None:
    """Which of an input's two forms a value has: what is wrong with it is said of that one alone."""
    if isinstance(value, list):
        return "items"
    return "text" if isinstance(value, str) else None


Items = list[Message | Assistant | FunctionCall | CustomCall | Output]
Input = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")] | Annotated[Items, Field(min_length=1), Tag("items")],
    Discriminator(
        _form,
        custom_error_type="input_form",
        custom_error_message="must be a text, or a list of messages, function calls and their outputs",
    ),
]
Instructions = str | Annotated[list[Part], Field(min_length=1)]


class Predicate(Form):
    type: Literal["predicate"]
    instructions: Instructions
    name: str | None = None

    @property
    def options(self) -> list[Option]:
        return [Option(True, "yes"), Option(False, "no")]

    @property
    def title(self) -> str:
        return "Is this true? "


class ChoiceOption(Form):
    value: StrictStr | StrictBool
    description: str | None = None


class Choice(Form):
    type: Literal["choice"]
    instructions: Instructions
    choices: Annotated[list[ChoiceOption], Field(min_length=2, max_length=MAX_CHOICES)]
    name: str | None = None

    @field_validator("choices")
    @classmethod
    def _differ(cls, choices: list[ChoiceOption]) -> list[ChoiceOption]:
        _check_unique([(type(each.value), each.value) for each in choices], "choices")
        return choices

    @property
    def options(self) -> list[Option]:
        """A boolean is written as JSON has it. One whose words a string has too is told apart by its type."""
        texts = {each.value for each in self.choices if isinstance(each.value, str)}
        found = []
        for each in self.choices:
            words = each.value if isinstance(each.value, str) else _compact(each.value)
            if isinstance(each.value, bool) and words in texts:
                words = f"{words} (boolean)"
            found.append(Option(each.value, words, each.description or ""))
        return found

    @property
    def title(self) -> str:
        return ""


class Level(Form):
    label: Annotated[str, Field(min_length=1)]
    description: str | None = None


class Score(Form):
    type: Literal["score"]
    instructions: Instructions
    levels: Annotated[list[Level], Field(min_length=2, max_length=MAX_LEVELS)]
    name: str | None = None

    @field_validator("levels")
    @classmethod
    def _differ(cls, levels: list[Level]) -> list[Level]:
        _check_unique([each.label for each in levels], "levels")
        return levels

    @property
    def options(self) -> list[Option]:
        return [Option(number, each.label, each.description or "") for number, each in enumerate(self.levels)]

    @property
    def title(self) -> str:
        return ""


Asked = Predicate | Choice | Score
Question = Annotated[Asked, Field(discriminator="type")]
QUESTION: TypeAdapter[Asked] = TypeAdapter(Question)
INPUT: TypeAdapter[Any] = TypeAdapter(Input)


def read(form: TypeAdapter[Read], value: Any, what: str) -> Read:
    """A question or an input of a row. Raises PosteriorError with the first complaint, and where it is."""
    try:
        return form.validate_python(value)
    except ValidationError as error:
        raise PosteriorError(f"{what}: {complaint(error, value)[1]}") from None


def fields(input: Any, question: Asked, labels: Labels, order: Sequence[int] | None = None) -> dict[str, str]:
    """What a decision task's template is filled with, the options in another order if one is given. Raises
    PosteriorError for an output without its call."""
    options, named = question.options, names(question, labels, order)
    return {
        "input": transcript(input),
        "question": question.title + _text(question.instructions),
        "options": "\n".join(_line(options[index], named[index]) for index in order or range(len(options))),
    }


def names(question: Asked, labels: Labels, order: Sequence[int] | None = None) -> list[str]:
    """How the model writes each option: by its words, or by the letter of its place in the prompt. A level has its
    number for a letter, a predicate always yes and no. Beyond 26 options there is no letter for each, and they are
    written by their words."""
    options = question.options
    if labels == "words" or isinstance(question, Predicate) or len(options) > len(string.ascii_uppercase):
        return [each.words for each in options]
    if isinstance(question, Score):
        return [str(each.value) for each in options]
    places = order or range(len(options))
    return [string.ascii_uppercase[list(places).index(number)] for number in range(len(options))]


def answer(question: Asked, said: Any) -> int:
    """The index of the option that a row's `answer` is. A level may be named by its label or its number.

    Raises PosteriorError.
    """
    for index, each in enumerate(question.options):
        if type(said) is type(each.value) and said == each.value:
            return index
        if isinstance(question, Score) and said == each.words:
            return index
    raise PosteriorError(f"the answer {said!r} is none of {[each.value for each in question.options]}")


def transcript(input: Any) -> str:
    """The input as one text: a text as it is, the text of a single user message, or a line an item."""
    if isinstance(input, str):
        return input
    if len(input) == 1 and isinstance(input[0], Message) and input[0].role == "user":
        return _text(input[0].content)
    calls: dict[str, str] = {}
    return "\n".join(_item(each, calls) for each in input)


def _item(item: Any, calls: dict[str, str]) -> str:
    """One item of an input; `calls` are the names of the calls before it, by call id."""
    if isinstance(item, Message | Assistant):
        return f"{item.role}: {_text(item.content)}"
    if isinstance(item, Output):
        if item.call_id not in calls:
            raise PosteriorError(f"the output of call {item.call_id!r} stands before any such call")
        return f"{calls[item.call_id]} returned: {_text(item.output)}"
    calls[item.call_id] = item.name
    return f"assistant called {item.name}: {item.arguments if isinstance(item, FunctionCall) else item.input}"


def _text(content: str | Sequence[Any]) -> str:
    """Parts as text, a line each."""
    if isinstance(content, str):
        return content
    return "\n".join(map(_part, content))


def _part(part: Any) -> str:
    if isinstance(part, Json):
        return _compact(part.data)
    return str(part.refusal if isinstance(part, Refusal) else part.text)


def _line(option: Option, name: str) -> str:
    """An option in the prompt."""
    own = name if name == option.words else f"{name}: {option.words}"
    return f"- {own}: {option.description}" if option.description else f"- {own}"


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _check_unique(values: Iterable[Any], what: str) -> None:
    seen = list(values)
    if len(set(seen)) != len(seen):
        raise ValueError(f"the {what} must differ from each other")


def one_choice(instructions: str, answers: Iterable[str]) -> Choice:
    """A choice of these answers. Raises PosteriorError."""
    choices = [{"value": each} for each in answers]
    found = read(QUESTION, {"type": "choice", "instructions": instructions, "choices": choices}, "question")
    assert isinstance(found, Choice)
    return found
