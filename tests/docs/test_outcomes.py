"""docs/outcomes.md has a row for every field of an outcome and of what is said of it."""

from __future__ import annotations

from typing import get_args

from server.configuration.schema import ServeSettings
from server.http.replies import OutcomeResult, OutcomesDeleted, OutcomesReply
from server.http.schemas import MAX_ID, MAX_OUTCOMES, Outcome
from server.store import tables
from server.store.values import Status
from tests.docs.test_answers import page
from tests.docs.test_decisions import fields, rows, spans

PAGE = page("outcomes.md")


def test_every_field_has_a_row() -> None:
    assert rows(PAGE, "Field of an outcome") == fields(Outcome)
    assert rows(PAGE, "Field of a reply") == fields(OutcomesReply, OutcomeResult)
    assert fields(OutcomesDeleted) <= spans(PAGE.partition("## Delete")[2])
    assert (
        rows(PAGE, "`status`")
        == set(get_args(Status))
        == set(get_args(OutcomeResult.model_fields["status"].annotation))
    )


def test_limits_are_those_of_the_code() -> None:
    assert f"1 to {MAX_OUTCOMES} outcomes" in PAGE and f"at most {MAX_ID} characters" in PAGE
    assert MAX_ID == tables.ID and ServeSettings().answers_days == 30
