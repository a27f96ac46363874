"""What outcomes in a database say: figures, drift and evidence, as values and as gauges."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posterior.calibration.drift import Reference
from posterior.calibration.exchangeability import evidence, scores
from posterior.calibration.familiarity import Center, Familiarity
from posterior.calibration.records import Collected, Record
from posterior.calibration.risk import Risk
from server.configuration.window import Window
from server.services import monitor as monitors
from server.services.learning import NO_HISTOGRAMS, NO_LABELS, NO_RECORD, NO_RISK, Learnt
from server.services.monitor import Monitor
from server.services.predictive import Service
from server.store.store import DAY, Store
from server.store.values import Answer, Reply, Report, Reporter
from tests.server import fakes
from tests.server.http.test_rightness import record as text_record
from tests.server.services.test_calibrated import KEY, give, record
from tests.server.store.made import OTHER, OWNER
from tests.server.store.test_store import report, statuses

HASH = fakes.Posterior("mood", "laplace").hash


@pytest.fixture
def store(service: Service, tmp_path: Path) -> Iterator[Store]:
    service.store = Store(f"sqlite:///{tmp_path}/outcomes.db", service.metrics)
    yield service.store
    service.store.close()


@pytest.fixture
def monitor(service: Service, store: Store) -> Monitor:
    posteriors: Any = {each.name: each for each in service.registry.posteriors}
    posteriors["gang"].hash = "another"
    return Monitor(service, store, Window())


def full(key: Any = KEY, **changes: Any) -> Record:
    """A record of 200 rows, whose confidences are spread evenly from .5 to 1, and of which a tenth is wrong."""
    confidence = [1 - i / 400 for i in range(200)]
    risk = Risk(confidence=tuple(confidence), right=tuple(i % 10 != 9 for i in range(200)))
    reference = Reference.of(confidence, [0.69 * 2 * (1 - c) for c in confidence])
    return record(key).model_copy(update={"risk": risk, "reference": reference, **changes})


def answered(p: float, **changes: Any) -> Answer:
    """An answer to a choice between two, of which the second is the best."""
    own: dict[str, Any] = {
        "kind": "answers", "predictive": "mixture", "particles": 3, "dtype": "bfloat16", "key": KEY.model_dump(),
        "options": (" no", " yes"), "probability": (1 - p, p), "best": 1, "confidence": p, "total": 0.69 * 2 * (1 - p),
    }  # fmt: skip
    return Answer(**own | changes)


def keep(store: Store, answers: list[Answer], right: list[bool | None], *, name: str = "r", **reply: Any) -> None:
    """Keeps the answers as replies of one each, and reports which were right; None: not at all."""
    for number, each in enumerate(answers):
        own = {"owner": OWNER, "created": time.time(), "model": "mood", "posterior": "mood", "hash": HASH, "base": "b"}
        store.keep(Reply(**{**own, **reply}, id=f"{name}{number}", answers={0: each}))
    reports = [Report(f"{name}{n}", correct=good) for n, good in enumerate(right) if good is not None]
    assert set(statuses(report(store, *reports, owner=reply.get("owner", OWNER)))) <= {"stored"}


def only(monitor: Monitor) -> Learnt:
    monitor.learn()
    ((_, found),) = monitor._snapshot.found
    return found


def value(service: Service, name: str, **labels: str) -> float | None:
    own = {"posterior": "mood", "predictive": "mixture", "kind": "answers"}
    return service.metrics.registry.get_sample_value(f"posterior_{name}", {**own, **labels})


def test_figures_are_of_all_outcomes_and_of_those_that_were_asked_for(
    service: Service, store: Store, monitor: Monitor
) -> None:
    asked = [answered(0.8, requested=True, prediction_set=(1,), coverage=0.9) for _ in range(10)]
    others = [answered(0.9, max_risk=0.2) for _ in range(10)] + [answered(0.6, max_risk=0.2, refusal="ambiguous")]
    keep(store, asked, [True] * 6 + [False] * 2 + [None] * 2, name="asked")
    keep(store, others, [True] * 9 + [False, False], name="other")
    found = only(monitor)
    assert (found.requested, found.reported) == (10, 8)
    every, requested = found.figures["all"], found.figures["requested"]
    assert (every.n, requested.n) == (19, 8)
    assert every.found["accuracy"].value == 15 / 19 and requested.found["accuracy"].value == 0.75
    assert requested.found["gap"].value == pytest.approx(0.05) and requested.found["coverage"].value == 0.75
    assert every.found["risk"].value == 0.1 and every.promised == pytest.approx({"coverage": 0.9, "max_risk": 0.2})
    assert value(service, "rolling_outcomes", sample="all") == 19
    own = {"sample": "all", "bin": "0.9"}
    assert value(service, "rolling_reliability", **own, of="n") == 10
    assert value(service, "rolling_reliability", **own, of="accuracy") == 0.9
    for bound in ("value", "low", "high"):
        expected = getattr(every.found["accuracy"], bound)
        assert value(service, "rolling_accuracy", sample="all", bound=bound) == expected
    assert value(service, "rolling_risk_promised", sample="all") == pytest.approx(0.2)
    assert value(service, "rolling_coverage_promised", sample="requested") == pytest.approx(0.9)
    assert (value(service, "labels_requested"), value(service, "labels_reported")) == (10, 8)


def test_the_window_counts_the_newest(store: Store, monitor: Monitor) -> None:
    keep(store, [answered(0.9, requested=True)], [None], name="old", created=time.time() - 3 * DAY)
    keep(store, [answered(0.9, requested=n % 2 == 0) for n in range(20)], [False] * 10 + [True] * 10)
    for window, n, accuracy in ((Window(10), 10, 1.0), (Window(15), 15, 10 / 15), (Window(days=1), 20, 0.5)):
        monitor.window = window
        found = only(monitor)
        assert (found.figures["all"].n, found.figures["all"].found["accuracy"].value) == (n, accuracy), str(window)
    assert found.requested == 10


def test_other_posteriors_and_owners_are_left_out(store: Store, monitor: Monitor, service: Service) -> None:
    keep(store, [answered(0.9)] * 3, [True] * 3)
    keep(store, [answered(0.9)] * 2, [False] * 2, name="other", owner=OTHER)
    keep(store, [answered(0.9)] * 4, [True] * 4, name="earlier", hash="an earlier fit's")
    keep(store, [answered(0.9)] * 4, [True] * 4, name="base", hash=None)
    assert only(monitor).figures["all"].n == 5
    ((_, own),) = monitor._learnt(service.registry.posteriors, OTHER)
    assert own.figures["all"].n == 2


def test_drift_is_from_the_rows_of_the_record(service: Service, store: Store, monitor: Monitor) -> None:
    give(service, full())
    keep(store, [answered(0.5 + n / 200) for n in range(100)], [None] * 100)
    like = only(monitor)
    assert {name: each.p_value > 0.5 for name, each in like.drift.items()} == {"confidence": True, "entropy": True}
    assert like.missing == {"exchangeability": NO_LABELS}
    keep(store, [answered(0.55) for _ in range(100)], [None] * 100, name="unsure")
    moved = only(monitor)
    assert all(each.p_value < 1e-6 and each.distance > 0.3 for each in moved.drift.values())
    assert (moved.drift["confidence"].n, moved.drift["confidence"].held) == (200, 200)
    assert value(service, "drift_distance", of="entropy") == moved.drift["entropy"].distance
    assert value(service, "drift_p_value", of="confidence") == moved.drift["confidence"].p_value


def test_familiarity_drifts_from_that_of_held_out_rows(service: Service, store: Store, monitor: Monitor) -> None:
    posterior: Any = service.registry.served["mood"].posterior
    none = torch.zeros(1)
    held = Familiarity(Center(none, none, none, none), torch.rand(100), torch.arange(100) % 2)
    posterior.familiarity = {("particle", "bfloat16"): held}
    assert sorted(held.of_held()) == pytest.approx(sorted([n / 50 for n in range(1, 51)] * 2))
    keep(store, [answered(0.9, familiarity=(n + 0.5) / 100) for n in range(100)], [None] * 100)
    found = only(monitor)
    assert found.drift["familiarity"].p_value > 0.9 and found.missing["drift"] == NO_RECORD
    keep(store, [answered(0.9, familiarity=0.01)] * 50, [None] * 50, name="strange")
    assert only(monitor).drift["familiarity"].p_value < 1e-3


def test_why_something_is_not_known(service: Service, store: Store, monitor: Monitor) -> None:
    keep(store, [answered(0.9, requested=True)], [True])
    assert only(monitor).missing == {"drift": NO_RECORD, "exchangeability": NO_RECORD}
    give(service, record())
    assert only(monitor).missing == {"drift": NO_HISTOGRAMS, "exchangeability": NO_RISK}
    give(service, full())
    assert only(monitor).missing == {}


def test_evidence_is_of_the_labels_that_were_asked_for(service: Service, store: Store, monitor: Monitor) -> None:
    given = full()
    assert given.risk is not None
    give(service, given)
    draw = random.Random(0)
    p = [0.5 + 0.5 * draw.random() for _ in range(150)]
    right = [draw.random() < 0.5 for _ in p]
    keep(store, [answered(each, requested=True) for each in p], list(right))
    keep(store, [answered(0.9)] * 30, [False] * 30, name="complaint")
    found = only(monitor)
    assert found.evidence == evidence(scores(given.risk.confidence, given.risk.right), scores(p, right))
    assert found.evidence is not None and found.evidence.rejected
    assert value(service, "exchangeability_evidence_log10", bound="largest") == found.evidence.largest
    assert value(service, "exchangeability_rejected") == 1
    later = Collected(requested=150, missing=0, until=time.time())
    give(service, full(collected=later))
    keep(store, [answered(0.9, requested=True)] * 3, [True] * 3, name="after")
    renewed = only(monitor)
    assert renewed.evidence is not None and renewed.evidence.n == 3, "a record is not tested by its own rows"
    assert renewed.drift["confidence"].n == 3


def test_evidence_of_texts_is_by_the_guard_of_their_record(service: Service, store: Store, monitor: Monitor) -> None:
    posterior: Any = service.registry.served["mood"].posterior
    known = text_record(posterior=HASH, samples=None)
    posterior.texts = {known.key: known}
    told = {"mean_logprob": -0.1, "logprob": -0.1, "information": 0.0, "entropy": 1.0, "epistemic": 0.2, "length": 0.0}
    text = answered(0.9, kind="text", options=None, probability=None, best=None, confidence=None,
                    key=known.key.model_dump(), features=told, requested=True)  # fmt: skip
    keep(store, [text] * 12, [True] * 12)
    found = only(monitor)
    guard = 1 / (1 + 2.718281828459045 ** -(1 + 2 * -0.1))
    expected = evidence(scores(known.risk.confidence, known.risk.right), [1 - guard] * 12)
    assert found.evidence is not None and expected is not None
    assert dataclasses.astuple(found.evidence) == pytest.approx(dataclasses.astuple(expected))


def test_a_wrong_answer_of_three_options_counts_as_outside_the_set(store: Store, monitor: Monitor) -> None:
    three = {"options": ("a", "b", "c"), "probability": (0.2, 0.5, 0.3), "coverage": 0.9}
    keep(store, [answered(0.5, **three, prediction_set=(1, 2))] * 2, [True, False])
    assert only(monitor).figures["all"].found["coverage"].value == 0.5


def test_a_thousand_answers_add_no_series(service: Service, store: Store, monitor: Monitor) -> None:
    def series() -> int:
        return sum(len(each.samples) for each in monitor.collect() if each.name != diagram)

    diagram = "posterior_rolling_reliability"

    for n in range(100):
        told = {"max_risk": n / 100 + 0.001, "requested": True, "prediction_set": (1,), "coverage": 0.9}
        keep(store, [answered(0.5 + n / 250, **told)], [bool(n % 3)], name=f"{n}x")
        if n == 5:
            monitor.learn()
            few = series()
    monitor.learn()
    assert series() == few
    (bins,) = [each.samples for each in monitor.collect() if each.name == diagram]
    assert len(bins) == 2 * 5 * 3, "confidences from .5 to .9, of all outcomes and of those that were asked for"


def test_the_thread_learns_when_outcomes_come_and_lives_on(
    service: Service, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(monitors, "APART_SECONDS", 0.01)
    failing = threading.Event()
    learnt = monitors.learnt

    def faulty(*arguments: Any) -> Any:
        if failing.is_set():
            raise OSError("the disk is gone")
        return learnt(*arguments)

    monkeypatch.setattr(monitors, "learnt", faulty)
    monitor = Monitor(service, store, Window())

    def until(n: float | None) -> None:
        deadline = time.monotonic() + 10
        while value(service, "rolling_outcomes", sample="all") != n and time.monotonic() < deadline:
            time.sleep(0.01)
        assert value(service, "rolling_outcomes", sample="all") == n

    keep(store, [answered(0.9)] * 2, [True] * 2, name="before")
    monitor.start()
    until(2)
    keep(store, [answered(0.9)], [True])
    until(3)
    failing.set()
    keep(store, [answered(0.9)], [True], name="unseen")
    deadline = time.monotonic() + 10
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "what outcomes say is not up to date: the disk is gone" in caplog.text
    assert value(service, "rolling_outcomes", sample="all") == 3
    failing.clear()
    assert asyncio.run(store.forget(Reporter(OWNER), "before0"))
    until(3)
    monitor.close()
