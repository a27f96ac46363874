"""Recording and alert rules: Prometheus's own unit tests pass, cover every alert, and the rules read known metrics."""

from typing import Any

import yaml

from tests.clients.grafana import GRAFANA, promtool
from tests.clients.test_grafana import METRICS, named_metrics

RULES = GRAFANA / "rules" / "posterior.yml"
UNIT_TESTS = GRAFANA / "rules" / "posterior.test.yml"
RULES_FOUND: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES_FOUND if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES_FOUND if "record" in rule}
# Alerts whose case has posteriors for which it stays silent, beside the one for which it fires.
SILENT_BESIDE = {"PosteriorStrangeQuestions", "PosteriorFailsItsSelfTest", "PosteriorRiskAbovePromise"}
WATCHED = {  # and on no panel
    "up",
    "posterior_refused",
    "posterior_linearized_restarts_total",
    "posterior_meaning_restarts_total",
    "posterior_learning_timestamp_seconds",
}


def test_the_unit_tests_of_prometheus_pass() -> None:
    promtool("check", "rules", RULES)
    promtool("test", "rules", UNIT_TESTS)


def test_every_alert_is_shown_to_fire_and_to_stay_silent() -> None:
    cases = [case for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    assert fires == set(ALERTS)
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert silent | SILENT_BESIDE == set(ALERTS)


def test_every_alert_says_what_to_do() -> None:
    for alert in ALERTS.values():
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert set(alert["annotations"]) == {"summary", "action"}


def test_rules_read_only_known_metrics() -> None:
    read = {name for rule in RULES_FOUND for name in named_metrics(rule["expr"])}
    assert read <= METRICS | RECORDED | WATCHED
    assert read >= WATCHED
