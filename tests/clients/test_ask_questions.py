"""`posterior ask` with questions, as a user runs it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest
from posterior_client import DecisionResponse
from posterior_client._bars import of_decisions
from posterior_client._uncertainty import decision_response
from rich.console import Console

from tests.clients.conftest import DECISION_USAGE, Ask, decided

TEXT = "My card is lost."
CHOICE = ("--choice", "Which department?", "cards, lost", "a=b")
PREDICATE, SCORE = ("--predicate", "The customer is in a hurry."), ("--score", "How urgent?", "low", "high")
ASKED = [
    {"type": "choice", "instructions": "Which department?", "choices": [{"value": "cards, lost"}, {"value": "a=b"}]},
    {"type": "predicate", "instructions": "The customer is in a hurry."},
    {"type": "score", "instructions": "How urgent?", "levels": [{"label": "low"}, {"label": "high"}]},
]
SHOWN = """\
Which department?
not answered, unfamiliar: the posterior knows too little about such inputs, and more training rows would help
it would be: a=b  (confidence 0.50, not calibrated)

  cards, lost  0.500  [0.125, 0.500]
  a=b          0.500  [0.125, 0.500]

familiarity 0.010: 99% of the held-out rows are less strange
entropy 0.562 nats = 0.500 aleatoric + 0.062 epistemic (11% epistemic)

The customer is in a hurry.
no  (confidence 0.50, not calibrated)

  yes  0.500  [0.125, 0.500]
  no   0.500  [0.125, 0.500]

entropy 0.562 nats = 0.500 aleatoric + 0.062 epistemic (11% epistemic)

How urgent?
not answered, ambiguous: the question itself leaves it open, and more training rows would not help
it would be: high  (confidence 0.50, not calibrated)

  low   0.500  [0.125, 0.500]
  high  0.500  [0.125, 0.500]

entropy 0.562 nats = 0.500 aleatoric + 0.062 epistemic (11% epistemic)

sentiment@0123456789ab, linearized predictive
"""


def test_questions_are_asked_and_shown_in_their_order(ask: Ask, stub: Any) -> None:
    shown = ask(TEXT, *CHOICE, *PREDICATE, *SCORE, "--max-risk", ".05", url=stub.url)
    assert shown == (0, SHOWN, "")
    options = {"max_risk": 0.05}
    assert stub.bodies == [{"model": "sentiment", "input": TEXT, "questions": ASKED, "uncertainty": options}]


def test_each_option_may_be_given_several_times(ask: Ask, stub: Any) -> None:
    assert ask(TEXT, *PREDICATE, *CHOICE, "--predicate", "a", "b", "--model", "m", url=stub.url)[0] == 0
    (body,) = stub.bodies
    assert [each["type"] for each in body["questions"]] == ["predicate", "choice", "predicate", "predicate"]
    assert body["model"] == "m" and "uncertainty" not in body


def test_json_is_the_reply_as_it_is(ask: Ask, stub: Any) -> None:
    status, shown, _ = ask(TEXT, *SCORE, "--json", "--coverage", ".5", "--orders", "2", url=stub.url)
    reply = json.loads(shown)
    assert (status, reply["object"], reply["answers"]) == (0, "decision", [decided(ASKED[2], held=False)])
    assert stub.bodies[0]["uncertainty"] == {"coverage": 0.5, "orders": 2}


@pytest.mark.parametrize("given", [(), ("-",)])
def test_the_text_may_come_from_standard_input(ask: Ask, stub: Any, given: tuple[str, ...]) -> None:
    assert ask(*given, *PREDICATE, url=stub.url, stdin="Verloren, vite.\nMüde\n".encode())[0] == 0
    assert stub.bodies[0]["input"] == "Verloren, vite.\nMüde"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((TEXT, "--choice", "a", "b"), "--choice: expected a question and 2 options or more"),
        ((TEXT, "--score", "How urgent?"), "--score: expected a question and 2 levels or more"),
        ((*CHOICE, "-"), "--choice: - for standard input stands ahead of the questions"),
        ((*CHOICE, TEXT), "standard input is empty; give the text ahead of the questions"),
        ((TEXT, "--max-risk", ".1"), "--max-risk belongs to questions; ask one with --choice"),
        ((TEXT, "--orders", "2"), "--orders belongs to questions"),
        ((TEXT, *CHOICE, "--field", "text"), "--field belongs to the posterior's own task"),
        ((TEXT, *CHOICE, "--write"), "--write and questions exclude each other"),
        ((TEXT, "--write", "--field", "text"), "--field belongs to the posterior's own task"),
        ((TEXT, "--write", "--coverage", ".5"), "--coverage belongs to intervals"),
        ((TEXT, "--doubt", "total"), "--doubt belongs to a text; add --write"),
        ((TEXT, *CHOICE, "--max-tokens", "0"), "--max-tokens belongs to a text"),
        ((TEXT, "--temperature", "0"), "--temperature belongs to a text"),
        ((TEXT, *CHOICE, "--max-risk", "five"), "invalid float value: 'five'"),
        ((TEXT, *CHOICE, "--max-risk", "nan"), "nan; give a finite number"),
        ((TEXT, *CHOICE, ""), "it is empty"),
        ((TEXT, *CHOICE, "--model", "m"), "no server answers at http://127.0.0.1:9/v1: start one with"),
    ],
)
def test_mistakes_are_one_line(ask: Ask, arguments: tuple[str, ...], line: str) -> None:
    status, shown, said = ask(*arguments, "--model", "m")
    assert (status, shown) == (2, "") and line in said
    assert said.startswith("posterior: ") and said.count("\n") == 1


def test_bytes_that_are_not_utf8_are_one_line(ask: Ask) -> None:
    assert ask("-", *CHOICE, stdin=b"\xff")[2] == (
        "posterior: standard input is not UTF-8; convert it, for example with iconv\n"
    )


def test_the_servers_refusals_are_one_line(ask: Ask, stub: Any) -> None:
    stub.key = "right"
    assert ask(TEXT, *CHOICE, url=stub.url) == (2, "", "posterior: a valid API key is needed\n")
    stub.key = None
    assert "1 questions were asked, and 0 answers came" in ask(TEXT, *CHOICE, "--model", "broken", url=stub.url)[2]


def response(question: Any, **record: Any) -> DecisionResponse:
    answer = decided(question, held=False)
    answer["uncertainty"] |= record
    return decision_response({"id": "", "created": 1, "model": "m", "answers": [answer], "usage": DECISION_USAGE}, 1)


def plain(shown: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=200, force_terminal=False).print(shown)
    return file.getvalue()


def test_a_calibrated_answer_in_several_orders() -> None:
    record = {"calibrated": True, "prediction_set": [1, 0], "orders": {"n": 2, "total_variation": 0.125}}
    lines = plain(of_decisions([ASKED[2]], response(ASKED[2], **record))).splitlines()
    assert lines[1] == "high  (confidence 0.50, level 0.50 of 0 to 1, calibrated)"
    assert "prediction set: high, low" in lines
    assert "asked in 2 orders: total variation from their average up to 0.125" in lines


def test_what_could_drive_the_terminal_is_not_shown() -> None:
    question: Any = {"type": "choice", "instructions": "\x1b[2J", "choices": [{"value": "a\x07"}, {"value": "b"}]}
    shown = plain(of_decisions([question], response(question)))
    assert "\x1b" not in shown and "\x07" not in shown


def test_the_verb_starts_without_torch() -> None:
    code = "import sys, server.cli, posterior_client.ask; sys.exit(bool({'torch', 'vllm', 'numpy'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
