"""The Helm chart, rendered by Helm's own Go code (helm-python-sdk) and checked against the schemas of Kubernetes
(kubernetes-validate). `make replicas-test` runs it in .venv-replicas. No cluster has seen the chart."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "clients/helm"
VERSIONS = ["1.29", "1.31", "1.33", "1.35", "1.37"]
KEYS = '[keys.alice]\nsha256 = "' + 64 * "0" + '"\nadmin = true\n'
LEAST: dict[str, Any] = {"keys": {"toml": KEYS}}
MOST: dict[str, Any] = {
    "replicas": 3,
    "image": {"repository": "registry.example.org/posterior-server", "tag": "cuda", "pullSecrets": ["registry"]},
    "options": ["--base", "/models/base", "--posteriors", "/models/posteriors", "--particles", "4"],
    "gpus": 2,
    "resources": {"requests": {"cpu": "8", "memory": "32Gi"}, "limits": {"memory": "32Gi"}},
    "runtimeClassName": "nvidia",
    "nodeSelector": {"gpu": "h200"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 1,
                    "podAffinityTerm": {
                        "topologyKey": "kubernetes.io/hostname",
                        "labelSelector": {"matchLabels": {"app.kubernetes.io/instance": "sentiment"}},
                    },
                }
            ]
        }
    },
    "keys": {"existingSecret": "posterior-keys"},
    "outcomes": {"existingSecret": "posterior-outcomes"},
    "models": {"existingClaim": "models"},
    "drainSeconds": 120,
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "bearerTokenSecret": "prometheus-key"},
}


def rendered(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        pages = chart.render(values, name="sentiment", namespace="models")
    for name, page in pages.items():
        if name.endswith(".yaml"):
            yield from filter(None, yaml.safe_load_all(page))


def kinds(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in rendered(values)}


def pod(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = kinds(values)["Deployment"]["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("values", [LEAST, MOST], ids=["least", "most"])
def test_helm_finds_nothing_to_say(values: dict[str, Any]) -> None:
    report = helm.lint(CHART, values, strict=True)
    assert report["errors"] == []
    assert [each for each in report["messages"] if each["severity"] > 1] == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", [LEAST, MOST, {**LEAST, "gpus": 0}], ids=["least", "most", "cpu"])
def test_every_object_is_one_of_kubernetes(values: dict[str, Any], version: str) -> None:
    checked = []
    for each in rendered(values):
        if each["kind"] != "PodMonitor":  # unchecked: of the operator of Prometheus, not of Kubernetes
            kubernetes_validate.validate(each, version, strict=True)
            checked.append(each["kind"])
    assert {*checked} >= {"Deployment", "Service", "ServiceAccount", "PodDisruptionBudget"}


def test_the_schemas_would_find_a_misspelt_field() -> None:
    deployment = kinds(LEAST)["Deployment"]
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


def test_without_keys_nothing_is_rendered() -> None:
    for values in ({}, {"keys": {"toml": KEYS, "existingSecret": "other"}}):
        with pytest.raises(helm.HelmError, match=r"keys\.existingSecret or keys\.toml"):
            list(rendered(values))


@pytest.mark.parametrize(
    "wrong",
    [
        {"replica": 2},
        {"replicas": 0},
        {"gpus": "one"},
        {"options": ["--port", "1"]},
        {"options": ["--host=::"]},
        {"image": {"tga": "x"}},
        {"podMonitor": {"interval": "often"}},
    ],
)
def test_a_value_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError):
        list(rendered(LEAST | wrong))


def test_a_pod_has_time_for_what_it_has_begun() -> None:
    for values in (LEAST, MOST):
        spec = pod(values)
        [container] = spec["containers"]
        drain = int(next(each["value"] for each in container["env"] if each["name"] == "POSTERIOR_DRAIN_SECONDS"))
        assert drain == values.get("drainSeconds", 30)
        stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert spec["terminationGracePeriodSeconds"] >= drain + stop + 30


def test_the_probes_ask_routes_that_need_no_key() -> None:
    [container] = pod(LEAST)["containers"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/ready", "liveness": "/health", "readiness": "/ready"}
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] == 30 * 60


def test_a_pod_may_do_nothing_but_serve() -> None:
    """What Kubernetes's standard "restricted" asks for, and a root file system that nobody writes to."""
    spec = pod(LEAST)
    [container] = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    assert "uid 10001" in (ROOT / "Dockerfile").read_text()
    mounts = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
    assert mounts == {"/cache", "/tmp", "/dev/shm"}
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in spec["volumes"]}


def test_gpus_are_limits_beside_the_other_resources() -> None:
    assert pod(MOST)["containers"][0]["resources"] == {
        "requests": {"cpu": "8", "memory": "32Gi"},
        "limits": {"memory": "32Gi", "nvidia.com/gpu": 2},
    }
    assert "nvidia.com/gpu" not in pod(LEAST | {"gpus": 0})["containers"][0]["resources"]["limits"]


def test_keys_are_a_secret() -> None:
    objects = kinds(LEAST)
    assert base64.b64decode(objects["Secret"]["data"]["keys.toml"]).decode() == KEYS
    named = {each["name"]: each for each in pod(LEAST)["volumes"]}["keys"]["secret"]
    assert named == {"secretName": objects["Secret"]["metadata"]["name"], "defaultMode": 0o400}
    assert "Secret" not in kinds(MOST) and KEYS not in str(kinds(MOST))
    assert {each["name"]: each for each in pod(MOST)["volumes"]}["keys"]["secret"]["secretName"] == "posterior-keys"
    annotation = [kinds({"keys": {"toml": toml}})["Deployment"]["spec"]["template"] for toml in (KEYS, KEYS + "\n")]
    assert annotation[0] != annotation[1], "other keys are other pods"


def test_the_monitor_shows_a_key_and_finds_the_pods() -> None:
    objects = kinds(MOST)
    monitor, template = objects["PodMonitor"], objects["Deployment"]["spec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert monitor["spec"]["podMetricsEndpoints"] == [
        {
            "port": "http",
            "path": "/metrics",
            "interval": "15s",
            "authorization": {"type": "Bearer", "credentials": {"name": "prometheus-key", "key": "key"}},
        }
    ]
    with pytest.raises(helm.HelmError, match="key of an admin"):
        list(rendered(LEAST | {"podMonitor": {"enabled": True}}))


def test_the_server_knows_every_option() -> None:
    command = os.environ.get("POSTERIOR_COMMAND", str(ROOT / ".venv/bin/posterior"))
    told = subprocess.run([command, "serve", "--help"], capture_output=True, text=True, check=True).stdout
    [container] = pod(MOST)["containers"]
    assert container["args"][0] == "serve"
    for option in (each.partition("=")[0] for each in container["args"] if each.startswith("--")):
        assert re.search(rf"{option}\b", told), option
