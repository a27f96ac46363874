"""Ray Serve adds replicas while requests wait, and takes them away. Stand-ins take the place of the servers: they start
at once and answer after two seconds."""

from __future__ import annotations

import concurrent.futures
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.replicas.cluster import REPLICA, ROOT, Cluster, clustered, wait_for

STANDIN = ROOT / "tests/server/replicas/standin.py"
SCALING = {
    "min_replicas": 1,
    "max_replicas": 3,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 3,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with clustered("standin.py") as cluster:
        args: dict[str, Any] = {
            "command": [sys.executable, str(STANDIN)],
            "serve": ["--folder", str(cluster.folder), "--answers-after", "2"],
        }
        cluster.start(args, autoscaling_config=SCALING, ray_actor_options={"num_cpus": 0})
        wait_for(lambda: cluster.get("/ready").status_code == 200, "a replica is ready", 120)
        yield cluster


def test_replicas_come_with_the_queue_and_go_with_it(cluster: Cluster) -> None:
    assert len(cluster.servers()) == 1
    stop, seen = threading.Event(), set[str]()

    def ask(number: int) -> None:
        with cluster.client() as client:
            while not stop.is_set():
                reply = client.post("/v1/predictive", json={"model": "mood", "prompts": [str(number)]})
                assert reply.status_code == 201, reply.text
                seen.add(reply.headers[REPLICA])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, number) for number in range(8)]
        try:
            wait_for(lambda: len(seen) == 3, "three replicas answer eight clients", 60)
        finally:
            stop.set()
        for each in asking:
            each.result(30)
    wait_for(lambda: len(cluster.servers()) == 1, "one replica is left when nobody asks", 120)
    assert cluster.get("/ready").status_code == 200
