"""docs/outcomes.md has a row for every field of an outcome and of what is said of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

from server.calibrate.outcomes import OutcomeCalibration
from server.configuration.schema import ServeSettings
from server.configuration.window import COUNT, MOST, Window
from server.http import outcome_replies as replies
from server.http.outcome_replies import OutcomeResult, OutcomesDeleted, OutcomesReply
from server.http.schemas import MAX_ID, MAX_OUTCOMES, Outcome
from server.metrics import Metrics
from server.services.monitor import Monitor
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
    assert f"{COUNT} of each (`--outcomes-window`)" in PAGE and f"up to {MOST:,}" in PAGE


def test_every_field_of_the_report_has_a_row() -> None:
    own = (
        replies.OutcomesReport, replies.OutcomesOfKind, replies.Samples, replies.OutcomesFigures, replies.Figure,
        replies.Promised, replies.Labels, replies.Missing,
    )  # fmt: skip
    assert fields(*own) == rows(PAGE, "Field of a report")
    assert fields(replies.DriftRecord, replies.ExchangeabilityRecord) == rows(PAGE, "Field")
    assert all(f"`{name}`" in PAGE for name in fields(replies.DriftRecords))


def test_every_gauge_and_option_has_a_row() -> None:
    service: Any = SimpleNamespace(metrics=Metrics())
    store: Any = SimpleNamespace()
    gauges = {each.name for each in Monitor(service, store, Window()).collect()}
    assert gauges == rows(PAGE, "Gauge")
    shown = rows(PAGE, "Option")
    assert {f"--{name.replace('_', '-')}" for name in fields_of(OutcomeCalibration)} == {
        each.split()[0] for each in shown
    }


def fields_of(settings: Any) -> set[str]:
    return set(settings.__dataclass_fields__)
