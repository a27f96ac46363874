"""What turned out to be true of earlier answers: POST /v1/outcomes, GET /v1/outcomes/report, and
DELETE /v1/outcomes/{id}."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from server.errors import Refused
from server.http.errors import ApiError
from server.http.schemas import Outcome, OutcomesRequest
from server.services.learning import Figures, Learnt
from server.services.predictive import Service
from server.store.store import Store
from server.store.values import Report, Reporter, Result
from server.validation import validated

FINAL = {"x-should-retry": "false"}  # OpenAI's SDKs would try a 409 again


async def reply(service: Service, body: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    """What became of each outcome, in order; that of a request for one alone is an error unless it is stored.

    Raises RequestError, and ApiError 404 or 409.
    """
    store = _store(service)
    if "outcomes" in body:
        reported = validated(OutcomesRequest, body).outcomes
        results = await store.report(reporter, [_report(each) for each in reported])
    else:
        results = await store.report(reporter, [_report(validated(Outcome, body))])
        _check(results[0])
    return {"object": "outcomes", "data": [_record(each) for each in results]}


async def delete(service: Service, id: str, reporter: Reporter) -> dict[str, Any]:
    """Deletes a reply's answers and their outcomes.

    Raises RequestError, and ApiError 404.
    """
    if not await _store(service).forget(reporter, id):
        raise _unknown("no answers of this id are kept")
    return {"id": id, "object": "outcomes.deleted", "deleted": True}


async def report(service: Service, reporter: Reporter) -> dict[str, Any]:
    """What the outcomes of the reporter's answers say, of an admin those of all keys.

    Raises RequestError, and ApiError 404.
    """
    if service.monitor is None:
        raise _nothing_kept()
    owner = None if reporter.admin else reporter.owner
    found = await service.monitor.report(service.registry.posteriors, owner)
    labels = {served.owner: served.label for served in service.registry.served.values()}
    return {
        "object": "outcomes.report",
        "window": str(service.monitor.window),
        "data": [_learnt(labels[posterior.name], each) for posterior, each in found],
    }


def _store(service: Service) -> Store:
    """Raises ApiError 404 where outcomes are not kept."""
    if service.store is None:
        raise _nothing_kept()
    return service.store


def _nothing_kept() -> ApiError:
    return ApiError(404, "this server keeps no answers; start it with --outcomes", code="answer_not_found")


def _report(outcome: Outcome) -> Report:
    return Report(outcome.id, outcome.index, outcome.answer, outcome.correct)


def _check(result: Result) -> None:
    """Raises the error of a single outcome that was not stored."""
    message = result.message or ""
    if result.status == "unknown":
        raise _unknown(message)
    if result.status == "conflict":
        raise ApiError(409, message, code="outcome_conflict", headers=FINAL)
    if result.status == "invalid":
        raise Refused(message, "answer")


def _unknown(message: str) -> ApiError:
    return ApiError(404, message, param="id", code="answer_not_found")


def _record(result: Result) -> dict[str, Any]:
    """The JSON of what became of an outcome."""
    record = {
        "id": result.report.id, "index": result.report.item, "status": result.status, "correct": result.correct,
    }  # fmt: skip
    return record if result.message is None else {**record, "message": result.message}


def _learnt(label: str | None, found: Learnt) -> dict[str, Any]:
    """The JSON of what outcomes say of one kind of answers of the posterior with this label."""
    against = found.evidence
    return {
        "posterior": label,
        "predictive": found.predictive,
        "kind": found.kind,
        "outcomes": {sample: _figures(each) for sample, each in found.figures.items()},
        "labels": {"requested": found.requested, "reported": found.reported},
        "drift": {of: asdict(each) for of, each in found.drift.items()},
        "exchangeability": None if against is None else {**asdict(against), "rejected": against.rejected},
        "missing": dict(found.missing),
    }


def _figures(figures: Figures) -> dict[str, Any]:
    """The JSON of what some outcomes say."""
    return {
        "n": figures.n,
        **{name: asdict(each) for name, each in figures.found.items()},
        "promised": dict(figures.promised),
    }
