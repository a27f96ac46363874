"""The joined page, as Prometheus's own parser reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.replicas.exposition import joined

Sample = tuple[str, tuple[tuple[str, str], ...], float]


def page(value: float) -> str:
    registry: Any = CollectorRegistry()
    Gauge("ready", "Whether it is", registry=registry).set(value)
    histogram = Histogram("wait_seconds", "How long", ["model"], registry=registry)
    for model in ('a"b\\', "two words"):
        histogram.labels(model).observe(value)
    if value > 1:
        Counter("only", "Of the second alone", registry=registry).inc()
    return str(generate_latest(registry).decode())


def samples(text: str) -> Iterator[tuple[str, Sample]]:
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            yield family.type, (each.name, tuple(sorted(each.labels.items())), each.value)


def test_every_sample_has_its_replica_and_every_family_stands_together() -> None:
    pages = {"a": page(1), "b": page(2)}
    expected = sorted(
        (kind, (name, tuple(sorted([*labels, ("replica", replica)])), value))
        for replica, text in pages.items()
        for kind, (name, labels, value) in samples(text)
    )
    text = joined(pages)
    assert sorted(samples(text)) == expected
    described = [line for line in text.splitlines() if line.startswith("#")]
    assert len(described) == len({*described}), "HELP and TYPE once"


def test_nothing_of_no_replica() -> None:
    assert joined({}) == ""
