"""docs/decisions.md has a row for every field that decision requests take and that their replies have."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import BaseModel

from posterior.data.decisions import Choice, ChoiceOption, Level, Predicate, Score
from server.http import decision_replies as decided
from server.http import replies
from server.http.schemas import DecisionRequest, NoulCriteria, SystemOneChoice, SystemOneRequest, SystemOneScore
from server.services.options import MAX_BACKWARD, MAX_SEQUENCES, DecisionUncertainty, Uncertainty
from tests.docs.blocks import ROOT, prose
from tests.docs.test_answers import page, tables

PAGE = prose(ROOT / "docs" / "decisions.md")
VLLMS = PAGE.partition("## With vLLM's protocol")[2]
OWN = PAGE.removesuffix(VLLMS)


def spans(text: str) -> set[str]:
    return {part for span in re.findall("`([^`]+)`", text) for part in re.split(r"\[\]\.|\.", span)}


def rows(text: str, first: str) -> set[str]:
    """The names in the first cells of all tables whose header begins with the cell `first`."""
    return spans(" ".join(row[0] for table in tables(text, first) for row in table))


def fields(*models: type[BaseModel]) -> set[str]:
    return {field for model in models for field in model.model_fields}


def test_every_field_of_a_request_has_a_row() -> None:
    assert fields(DecisionRequest) <= rows(OWN, "Field")
    assert fields(DecisionUncertainty) - fields(Uncertainty) <= rows(OWN, "Field")
    assert fields(Predicate, Choice, Score, ChoiceOption, Level) <= rows(OWN, "Field of a question")
    assert fields(SystemOneRequest, SystemOneChoice, SystemOneScore) <= rows(VLLMS, "Field") | {"type"}
    assert fields(NoulCriteria) <= spans(VLLMS)


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        (OWN, DecisionRequest.model_json_schema()["properties"]["questions"]),
        (OWN, Choice.model_json_schema()["properties"]["choices"]),
        (OWN, Score.model_json_schema()["properties"]["levels"]),
        (VLLMS, SystemOneRequest.model_json_schema()["properties"]["questions"]),
        (VLLMS, SystemOneChoice.model_json_schema()["properties"]["criteria"]),
        (VLLMS, SystemOneScore.model_json_schema()["properties"]["criteria"]),
    ],
)
def test_rows_have_the_limits_of_the_code(text: str, schema: dict[str, Any]) -> None:
    bounds = [schema.get(name) for name in ("minItems", "maxItems", "minProperties", "maxProperties")]
    low, high = [bound for bound in bounds if bound is not None]
    assert f"{low} to {high}" in text


def test_what_is_bounded_is_what_the_code_bounds() -> None:
    cells = {row[0]: row[1] for table in tables(PAGE, "Limit") for row in table}
    assert cells["evaluations"].startswith(f"{MAX_SEQUENCES:,} ")
    assert cells["backward passes"].startswith(f"{MAX_BACKWARD} ")


def test_every_field_of_a_reply_has_a_row() -> None:
    answers = fields(
        decided.DecisionReply, decided.PredicateAnswer, decided.ChoiceAnswer, decided.ScoreAnswer,
        decided.ChoiceProbability, decided.ScoreProbability, decided.DecisionUsage, decided.InputDetails,
        decided.OutputDetails,
    )  # fmt: skip
    assert answers <= rows(OWN.partition("## Fields of a decision\n")[2], "Field")
    vllms = fields(
        decided.SystemOneReply, decided.SystemOneChoiceAnswer, decided.SystemOneNoulAnswer,
        decided.SystemOneScoreAnswer, decided.SystemOneDiagnostics, decided.SystemOneUsage,
    )  # fmt: skip
    assert vllms <= spans(VLLMS)


def test_the_record_is_that_of_a_choice() -> None:
    asked = rows(page("answers.md").partition("## Fields of a reply")[2], "Field")
    own = rows(OWN, "Field")
    assert fields(replies.DecisionRecord, replies.OptionCandidate) <= asked | own
    assert fields(decided.RefusedRecord, replies.OrdersRecord) <= asked | own
