"""Typed questions: OpenAI's form, what the model reads, and rows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai.types import decision_create_params as contract

from posterior.data import decisions
from posterior.data.decisions import INPUT, QUESTION, TEMPLATE, read
from posterior.data.examples import collate, encode
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.models.base import load_tokenizer, resolve

CHOICE = {
    "type": "choice",
    "name": "where",
    "instructions": "Which department?",
    "choices": [{"value": "cards", "description": "cards and PINs"}, {"value": "loans"}, {"value": True}],
}
PREDICATE = {"type": "predicate", "instructions": "The customer is angry."}
SCORE = {"type": "score", "instructions": "How urgent?", "levels": [{"label": "low"}, {"label": "high"}]}


TEXT, IMAGE = {"type": "input_text", "text": "hello"}, {"type": "input_image", "image_url": "x"}


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(resolve(str(tiny_base)))


def shown(input: Any, question: dict[str, Any], labels: decisions.Labels = "words") -> str:
    asked = read(QUESTION, question, "question")
    return TEMPLATE.format_map(decisions.fields(read(INPUT, input, "input"), asked, labels))


def test_what_the_model_reads() -> None:
    assert shown("My card is lost.", CHOICE) == (
        "My card is lost.\n\nWhich department?\n- cards: cards and PINs\n- loans\n- true\nAnswer:"
    )
    assert shown("x", CHOICE, "letters").splitlines()[3:6] == ["- A: cards: cards and PINs", "- B: loans", "- C: true"]
    assert shown("x", PREDICATE).splitlines()[2:5] == ["Is this true? The customer is angry.", "- yes", "- no"]
    assert shown("x", SCORE, "letters").splitlines()[3:5] == ["- 0: low", "- 1: high"]


def test_the_input_is_the_prefix_of_all_its_questions() -> None:
    prompts = [shown("My card is lost.", question) for question in (CHOICE, PREDICATE, SCORE)]
    assert all(prompt.startswith("My card is lost.\n\n") for prompt in prompts)


def test_a_conversation_is_a_transcript() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "hello"}, {"type": "input_json", "data": {"a": [1]}}],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "hi"}, {"type": "refusal", "refusal": "no"}]},
        {"type": "function_call", "call_id": "1", "name": "find", "arguments": '{"id":1}'},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "found"}]},
        {"type": "custom_tool_call", "call_id": "2", "name": "run", "input": "ls"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "done"},
    ]
    assert decisions.transcript(read(INPUT, items, "input")) == (
        'developer: Be brief.\nuser: hello\n{"a":[1]}\nassistant: hi\nno\nassistant called find: {"id":1}\n'
        "find returned: found\nassistant called run: ls\nrun returned: done"
    )
    one = [{"role": "user", "content": "hello"}]
    assert decisions.transcript(read(INPUT, one, "input")) == "hello", "as the text alone"


@pytest.mark.parametrize(
    ("form", "params"),
    [
        (decisions.Predicate, contract.QuestionQuestionParamPredicate),
        (decisions.Choice, contract.QuestionQuestionParamChoice),
        (decisions.ChoiceOption, contract.QuestionQuestionParamChoiceChoice),
        (decisions.Score, contract.QuestionQuestionParamScore),
        (decisions.Level, contract.QuestionQuestionParamScoreLevel),
        (decisions.Message, contract.InputUnionMember1DecisionInputUserMessage),
        (decisions.Assistant, contract.InputUnionMember1DecisionInputAssistantMessage),
        (decisions.FunctionCall, contract.InputUnionMember1DecisionInputFunctionCall),
        (decisions.CustomCall, contract.InputUnionMember1DecisionInputCustomToolCall),
        (decisions.Output, contract.InputUnionMember1DecisionInputFunctionCallOutput),
    ],
)
def test_the_fields_are_openais(form: Any, params: Any) -> None:
    assert set(form.model_fields) == set(params.__annotations__)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"type": "choice", "instructions": "x", "choices": [{"value": "a"}]}, "choices: List should have at least 2"),
        ({"type": "choice", "instructions": "x", "choices": [{"value": 1}, {"value": "a"}]}, r"choices\.0\.value"),
        ({"type": "choice", "instructions": "x", "choices": 2 * [{"value": "a"}]}, "the choices must differ"),
        ({"type": "choice", "instructions": "x", "choices": [{"value": str(i)} for i in range(256)]}, "at most 255"),
        ({"type": "score", "instructions": "x", "levels": [{"label": str(i)} for i in range(11)]}, "at most 10"),
        ({"type": "predicate"}, "'instructions' is required"),
        ({"type": "predicate", "instructions": "x", "extra": 1}, "unknown field 'extra'"),
        ({"type": "other"}, "'predicate', 'choice', 'score'"),
        (
            {"type": "predicate", "instructions": [{"type": "input_image", "image_url": "x"}]},
            "images are not read here",
        ),
        ("who?", "must be"),
    ],
)
def test_a_question_that_is_none(question: Any, words: str) -> None:
    with pytest.raises(PosteriorError, match=words):
        read(QUESTION, question, "question")


@pytest.mark.parametrize(
    ("input", "words"),
    [
        ("", "at least 1"),
        ([], "at least 1|valid"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "images are not read here"),
        ([{"role": "user", "content": [{"type": "input_json", "data": {"a": 40 * "["}}, {"type": "x"}]}], "'x'"),
    ],
)
def test_an_input_that_is_none(input: Any, words: str) -> None:
    with pytest.raises(PosteriorError, match=words):
        read(INPUT, input, "input")


def test_json_parts_are_bounded() -> None:
    deep: Any = {}
    for _ in range(40):
        deep = {"a": deep}
    for data in (deep, {"a": list(range(20_000))}, {"a": "x" * 300_000}):
        with pytest.raises(PosteriorError, match="at most 32 levels, 10000 values and 262144 bytes"):
            read(INPUT, [{"role": "user", "content": [{"type": "input_json", "data": data}]}], "input")


def test_an_output_needs_its_call() -> None:
    items = [{"type": "function_call_output", "call_id": "1", "output": "x"}]
    with pytest.raises(PosteriorError, match="output of call '1' stands before any such call"):
        decisions.transcript(read(INPUT, items, "input"))


def test_values_keep_their_types() -> None:
    choices = [{"value": "true"}, {"value": True}, {"value": False}]
    question = read(QUESTION, {"type": "choice", "instructions": "x", "choices": choices}, "question")
    assert decisions.names(question, "words") == ["true", "true (boolean)", "false"]
    assert [decisions.answer(question, said) for said in ("true", True, False)] == [0, 1, 2]
    score = read(QUESTION, SCORE, "question")
    assert decisions.answer(score, 1) == decisions.answer(score, "high") == 1
    for said in (1, "false", None):
        with pytest.raises(PosteriorError, match="is none of"):
            decisions.answer(question, said)


def test_many_options_are_written_by_their_words() -> None:
    choices = [{"value": f"option {i}"} for i in range(27)]
    question = read(QUESTION, {"type": "choice", "instructions": "x", "choices": choices}, "question")
    assert decisions.names(question, "letters")[26] == "option 26"


def test_rows_of_many_kinds_are_one_task(tokenizer: Any) -> None:
    rows = [
        {"input": "x", "question": CHOICE, "answer": True},
        {"input": "x", "question": PREDICATE, "answer": False},
        {"input": "x", "question": SCORE, "answer": "high"},
    ]
    examples = encode(Task("decision", TEMPLATE), tokenizer, rows)
    assert [(len(e.continuations), e.label) for e in examples] == [(3, 2), (2, 1), (2, 1)]
    assert collate(examples[1:2]).label.tolist() == [1]
    with pytest.raises(PosteriorError, match="row 1: the answer 'x' is none of"):
        encode(Task("decision", TEMPLATE), tokenizer, [{**rows[0], "answer": "x"}])
    with pytest.raises(PosteriorError, match="row 1: the row has no 'question'"):
        encode(Task("decision", TEMPLATE), tokenizer, [{"input": "x", "answer": "x"}])


def test_ordinary_rows_are_asked_the_tasks_question(tokenizer: Any) -> None:
    task = Task("decision", TEMPLATE, question=decisions.one_choice("Which department?", ["cards", "loans"]))
    examples = encode(task, tokenizer, [{"text": "x", "label": "loans"}, {"text": "y", "label": 0}])
    assert [e.label for e in examples] == [1, 0]
    assert task.answers_of({"text": "x"}) == ("cards", "loans")
    assert Task.from_json(task.to_json()) == task


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answers": ("a", "b")}, "brings its own options"),
        ({"template": "{text}"}, r"needs \{input\} and \{question\}"),
        ({"template": "{input} {question} {other}"}, "may have {options}"),
        ({"labels": "numbers"}, "labels 'numbers' are unknown"),
    ],
)
def test_a_task_that_is_none(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PosteriorError, match=words):
        Task(**{"kind": "decision", "template": TEMPLATE} | changes)
