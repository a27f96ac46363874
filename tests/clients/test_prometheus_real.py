"""The dashboard on a real Prometheus: it scrapes the running server, and every panel's query returns data."""

import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from posterior_client import InvalidRequestError, PosteriorClient
from prometheus_client import Metric, start_http_server
from prometheus_client.registry import Collector

from posterior.calibration.drift import Drift
from posterior.calibration.exchangeability import Evidence
from posterior.calibration.rolling import Labelled, figures, promised, reliability
from server.metrics import Metrics
from server.services.gauges import gauges
from server.services.learning import Figures, Learnt, Of, Sample
from tests.clients.grafana import GRAFANA, PANELS, expression, promtool, tool
from tests.server.running import KEY, Running

ANSWERS = [" negative", " positive"]


class Outcomes(Collector):
    """What a server would have learnt from outcomes of `mood`."""

    def collect(self) -> Iterator[Metric]:
        rows = [Labelled(n % 3 > 0, 0.5 + n / 100, True, 0.9, 0.1) for n in range(40)]
        own = Figures(len(rows), figures(rows), promised(rows), reliability(rows))
        moved: dict[Of, Drift] = {"confidence": Drift(40, 100, 0.2, 0.1)}
        samples: dict[Sample, Figures] = {"all": own}
        found = Learnt("mixture", "answers", samples, 30, 20, moved, Evidence(20, 0.1, 0.3), {})
        return gauges([(("mood", "mixture", "answers"), found)])


@pytest.fixture(scope="module")
def stand_in() -> Iterator[str]:
    """Where gauges are that take weeks of outcomes, an alias, or a failed self-test: their names and labels are the
    server's own, their values made up."""
    metrics = Metrics()
    metrics.registry.register(Outcomes())
    metrics.aliases.labels("live", "mood", "abc").set(1)
    for gauge in (metrics.probe_difference, metrics.probe_gap, metrics.probe_gap_z):
        gauge.labels("mood", "abc").set(0.01)
    refused = metrics.abstentions.labels("mood", "ambiguous")
    server, thread = start_http_server(0, "127.0.0.1", metrics.registry)
    stop = threading.Event()

    def count() -> None:
        while not stop.wait(0.5):
            refused.inc()

    counting = threading.Thread(target=count)
    counting.start()
    yield f"127.0.0.1:{server.server_port}"
    stop.set()
    counting.join()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def prometheus(server: Running, stand_in: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus with our scrape config, but this server as target, a token file that is there, and 1 s scrapes."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "key").write_text(KEY)
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    job["authorization"]["credentials_file"] = str(folder / "key")
    job["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    config["scrape_configs"].append({"job_name": "stand-in", "static_configs": [{"targets": [stand_in]}]})
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copytree(GRAFANA / "rules", folder / "rules")
    promtool("check", "config", folder / "prometheus.yml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {"config.file": "prometheus.yml", "storage.tsdb.path": "data", "web.listen-address": address}
    command = [tool("prometheus"), *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while not reachable(f"http://{address}/-/ready"):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)


def reachable(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


def query(prometheus: str, expression: str) -> list[tuple[dict[str, str], float]]:
    """The finite samples of an instant query, with their labels, by Prometheus's own HTTP API."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=5) as response:
        found: list[dict[str, Any]] = json.load(response)["data"]["result"]
    samples = [(one["metric"], float(one["value"][1])) for one in found]
    return [(labels, value) for labels, value in samples if math.isfinite(value)]


def has_data(prometheus: str, target: dict[str, Any]) -> bool:
    """Some sample is there, with every label that the panel's legend shows."""
    shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    return any(shown <= labels.keys() for labels, _ in query(prometheus, expression(target)))


def traffic(server: Running) -> None:
    """One of everything the dashboard counts: every predictive of every posterior, as many particles as needed, text
    whose record says how probably it is right, samples, a question with rows to compare it with and its outcome, and a
    refusal."""
    with PosteriorClient(f"{server.url}/v1", KEY) as client:
        posteriors = [model for model in client.openai.models.list() if "mixture" in getattr(model, "predictives", ())]
        for model in posteriors:
            for predictive in model.predictives:  # type: ignore[attr-defined]
                client.predictive(model=model.id, prompts=["It was"], answers=ANSWERS, predictive=predictive)
            client.predictive(
                model=model.id, prompts=["It was"], answers=ANSWERS, predictive="mixture", particles="auto"
            )
            client.openai.completions.create(model=model.id, prompt="It was", max_tokens=2, temperature=0)
            client.openai.completions.create(
                model=model.id, prompt="It was", max_tokens=2, extra_body={"uncertainty": {"samples": 2}}
            )
        asked = client.predictive(model="mood", inputs=[{"text": "It was"}])
        client.outcomes.report([{"id": asked.id, "correct": True}])
        with pytest.raises(InvalidRequestError):
            client.predictive(model=posteriors[0].id, prompts=["It was"], answers=[" same", " same"])


def test_every_panel_has_data(prometheus: str, server: Running) -> None:
    waiting = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
    deadline = time.monotonic() + 90
    while waiting and time.monotonic() < deadline:  # a rate needs traffic between two scrapes
        traffic(server)
        time.sleep(1)
        waiting = [(title, target) for title, target in waiting if not has_data(prometheus, target)]
    assert not waiting


def test_the_numbers_are_the_server_s(prometheus: str, server: Running) -> None:
    request = urllib.request.Request(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=5) as response:
        lines = response.read().decode().splitlines()
    counted = [({}, sum(float(line.split()[-1]) for line in lines if line.startswith("posterior_answers_total{")))]
    deadline = time.monotonic() + 10
    while (seen := query(prometheus, "sum(posterior_answers_total)")) != counted and time.monotonic() < deadline:
        time.sleep(0.2)
    assert seen == counted
    assert [value for _, value in query(prometheus, "up")] == [1.0, 1.0]


def test_every_rule_is_evaluated_without_error(prometheus: str, server: Running) -> None:
    waiting, deadline = ["the rules"], time.monotonic() + 90
    while waiting and time.monotonic() < deadline:  # a rate needs traffic between two scrapes
        traffic(server)
        time.sleep(1)
        with urllib.request.urlopen(f"{prometheus}/api/v1/rules", timeout=5) as response:
            rules = [rule for group in json.load(response)["data"]["groups"] for rule in group["rules"]]
        failed = [rule["name"] for rule in rules if rule["health"] != "ok"]
        recorded = {rule["name"] for rule in rules if rule["type"] == "recording"}
        waiting = failed or [name for name in recorded if not query(prometheus, name)]
    assert not waiting and recorded
