"""clients/grafana as files: they parse, hold no default secret, and ask only for metrics that exist."""

import json
import re
from pathlib import Path

import pytest
import yaml

from server.services.gauges import gauges
from tests.clients.grafana import DASHBOARD, GRAFANA, PANELS, expression, promtool

COMPOSE = yaml.safe_load((GRAFANA / "compose.yaml").read_text())
HISTOGRAMS = {
    "posterior_request_duration_seconds",
    "posterior_confidence",
    "posterior_epistemic_entropy_nats",
    "posterior_total_entropy_nats",
    "posterior_auto_particles",
    "posterior_familiarity",
    "posterior_token_epistemic_entropy_nats",
    "posterior_semantic_entropy_nats",
    "posterior_semantic_epistemic_entropy_nats",
    "posterior_text_confidence",
    "posterior_effective_particles_ratio",
    "posterior_linearized_batch_size",
    "posterior_linearized_queue_seconds",
    "vllm:time_to_first_token_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
}
LEARNT = {metric.name for metric in gauges([])}
METRICS = {
    "posterior_requests_total",
    "posterior_prompt_tokens_total",
    "posterior_generated_tokens_total",
    "posterior_answers_total",
    "posterior_gang_resumes_total",
    "posterior_key_requests_total",
    "posterior_key_tokens_total",
    "posterior_outcomes_total",
    "posterior_answers_dropped_total",
    "posterior_abstentions_total",
    "posterior_ready",
    "posterior_info",
    "posterior_alias_info",
    "posterior_adapters",
    "posterior_adapter_places",
    "posterior_draining",
    "posterior_probe_difference",
    "posterior_probe_gap",
    "posterior_probe_gap_z",
    *LEARNT,
    "vllm:num_preemptions_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
} | {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}


EXPRESSIONS = [expression(target) for panel in PANELS for target in panel["targets"]]


def family(name: str) -> str:
    """A histogram's own name."""
    return re.sub(r"_(bucket|sum|count)$", "", name)


def named_metrics(expression: str) -> set[str]:
    """The metrics an expression reads: its identifiers that are neither labels, functions nor keywords."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(by|on) \([^)]*\)", " ", expression)
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*(?!\w|:| *\()", bare)) - {"sum", "by", "and", "or", "group_left"}


def test_every_expression_parses(tmp_path: Path) -> None:
    rules = [{"record": "a:b", "expr": one, "labels": {"n": str(n)}} for n, one in enumerate(EXPRESSIONS)]
    path = tmp_path / "rules.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", path)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_reads_only_known_metrics(expression: str) -> None:
    assert named_metrics(expression) and named_metrics(expression) <= METRICS


def test_every_metric_is_on_a_panel() -> None:
    shown = {family(name) for expression in EXPRESSIONS for name in named_metrics(expression)}
    assert shown == {family(name) for name in METRICS}


def test_panels_do_not_overlap_and_use_the_provisioned_datasource() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    [datasource] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert not datasource["editable"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {datasource["uid"]}


def test_the_scrape_config_is_clean() -> None:
    # Syntax only: the token file exists inside compose, not here. test_prometheus_real.py checks the whole.
    promtool("check", "config", "--syntax-only", GRAFANA / "prometheus.yml")


def test_compose_pins_images_binds_loopback_and_has_no_default_secret() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"]) if "image" in service else service["build"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    for service, secret in (("server", "POSTERIOR_API_KEY"), ("grafana", "GF_SECURITY_ADMIN_PASSWORD")):
        assert re.match(r"\$\{\w+:\?", services[service]["environment"][secret])  # compose refuses when unset
    assert COMPOSE["secrets"] == {"posterior_api_key": {"environment": "POSTERIOR_API_KEY"}}


def test_every_mounted_file_exists_and_provisioning_points_at_it() -> None:
    mounts = [volume.split(":") for volume in COMPOSE["services"]["grafana"]["volumes"] if volume.startswith("./")]
    assert all((GRAFANA / source).exists() and mode == "ro" for source, _, mode in mounts)
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/posterior.yaml").read_text())["providers"]
    assert provider["options"]["path"] in [target for _, target, _ in mounts]
    assert not provider["allowUiUpdates"]
