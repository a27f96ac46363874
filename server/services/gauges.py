"""What was learnt from outcomes as Prometheus gauges. Series are as many as what is served has predictives and kinds of
questions: names come from the registry, never from clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from posterior.calibration.exchangeability import LEVEL
from posterior.calibration.rolling import PROMISED
from server.services.learning import Learnt

OWN = ("posterior", "predictive", "kind")
BOUNDS = ("value", "low", "high")
FIGURES = {  # by their name in posterior/calibration/rolling.py
    "accuracy": ("accuracy", "Share of answers that were right."),
    "nll": ("nll_nats", "Mean negative log-probability, by the confidence, of whether answers are right."),
    "brier": ("brier", "Mean squared difference of confidence and rightness."),
    "ece": ("ece", "Expected calibration error of the confidence."),
    "gap": ("gap", "Mean confidence less accuracy."),
    "coverage": ("coverage", "Share of prediction sets that held what was true."),
    "risk": ("risk", "Share of wrong answers among those that max_risk let pass."),
}
PROMISES = {"coverage": "Mean coverage that was asked for.", "risk": "Mean max_risk of the answers that it let pass."}

Rows = Sequence[tuple[tuple[str, str, str], Learnt]]  # by the values of OWN


def gauges(rows: Rows) -> Iterator[Metric]:
    """All of them."""
    for part in (_of_figures, _of_reliability, _of_labels, _of_drift, _of_evidence):
        yield from part(rows)


def _of_figures(rows: Rows) -> Iterator[Metric]:
    about, labels = "Outcomes in the window: all, or those whose label was asked for.", (*OWN, "sample")
    count = GaugeMetricFamily("posterior_rolling_outcomes", about, labels=labels)
    gauges = {
        name: GaugeMetricFamily(f"posterior_rolling_{shown}", about, labels=(*labels, "bound"))
        for name, (shown, about) in FIGURES.items()
    }
    goals = {
        name: GaugeMetricFamily(f"posterior_rolling_{name}_promised", about, labels=labels)
        for name, about in PROMISES.items()
    }
    for own, each in rows:
        for sample, figures in each.figures.items():
            count.add_metric((*own, sample), figures.n)
            for name, estimate in figures.found.items():
                for bound in BOUNDS:
                    gauges[name].add_metric((*own, sample, bound), getattr(estimate, bound))
            for name, goal in goals.items():
                if (promise := figures.promised.get(PROMISED[name])) is not None:
                    goal.add_metric((*own, sample), promise)
    yield from (count, *gauges.values(), *goals.values())


def _of_reliability(rows: Rows) -> Iterator[Metric]:
    about = "Of the answers in a bin of the reliability diagram: their mean confidence, the share of right ones, and n."
    gauge = GaugeMetricFamily("posterior_rolling_reliability", about, labels=(*OWN, "sample", "bin", "of"))
    for own, each in rows:
        for sample, figures in each.figures.items():
            for one in figures.reliability:
                for of in ("confidence", "accuracy", "n"):
                    gauge.add_metric((*own, sample, f"{one.upper:g}", of), getattr(one, of))
    yield gauge


def _of_labels(rows: Rows) -> Iterator[Metric]:
    about = "Answers of the window whose label was asked for."
    requested = GaugeMetricFamily("posterior_labels_requested", about, labels=OWN)
    reported = GaugeMetricFamily("posterior_labels_reported", "Those of them whose label came.", labels=OWN)
    for own, each in rows:
        requested.add_metric(own, each.requested)
        reported.add_metric(own, each.reported)
    yield from (requested, reported)


def _of_drift(rows: Rows) -> Iterator[Metric]:
    about = "Largest difference of shares between the answers of the window and the calibration's rows."
    distance = GaugeMetricFamily("posterior_drift_distance", about, labels=(*OWN, "of"))
    about = "Probability of so large a distance where nothing has changed."
    p_value = GaugeMetricFamily("posterior_drift_p_value", about, labels=(*OWN, "of"))
    for own, each in rows:
        for of, drift in each.drift.items():
            distance.add_metric((*own, of), drift.distance)
            p_value.add_metric((*own, of), drift.p_value)
    yield from (distance, p_value)


def _of_evidence(rows: Rows) -> Iterator[Metric]:
    about = "log10 of the capital of a test martingale against exchangeability: now, and at most."
    evidence = GaugeMetricFamily("posterior_exchangeability_evidence_log10", about, labels=(*OWN, "bound"))
    about = f"1 from when it has reached {1 / LEVEL:g}: what the calibration promises no longer holds."
    rejected = GaugeMetricFamily("posterior_exchangeability_rejected", about, labels=OWN)
    for own, each in rows:
        if each.evidence is not None:
            evidence.add_metric((*own, "now"), each.evidence.now)
            evidence.add_metric((*own, "largest"), each.evidence.largest)
            rejected.add_metric(own, each.evidence.rejected)
    yield from (evidence, rejected)
