"""Two real servers on Ray Serve: what clients see when one is killed, and when all are replaced. `make replicas-test`
runs it (minutes, about 8 GB)."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from posterior.models import base as base_models
from tests.replicas.cluster import REPLICA, Cluster, clustered, wait_for
from tests.server import folders

PATIENCE = 420  # seconds for two servers to be ready on two cores


def arguments(posteriors: Path) -> dict[str, Any]:
    """The application's, for small servers of the posteriors in a folder."""
    options = ["--posteriors", str(posteriors), "--max-model-len", "1024", "--kv-cache-gib", "0.5"]
    return {"command": [sys.executable, "-m", "server.cli"], "serve": options}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with clustered("server.cli") as cluster:
        base = base_models.resolve()
        for name, weights in (("old", (0.5, 0.3, 0.2)), ("new", (0.2, 0.3, 0.5))):
            (cluster.folder / name).mkdir()
            folders.particles(cluster.folder / name, base, weights)
        cluster.start(arguments(cluster.folder / "old"))
        wait_for(lambda: len(names(cluster)) == 2, "two replicas are ready", PATIENCE)
        yield cluster


def names(cluster: Cluster) -> set[str]:
    """The replicas that answer: each metric has one's name."""
    lines = [line for line in cluster.get("/metrics").text.splitlines() if line.startswith("posterior_ready{")]
    return {line.partition('replica="')[2].partition('"')[0] for line in lines}


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "gang", "messages": [{"role": "user", "content": text}], "max_tokens": 64, **more}


def predictive(text: str) -> dict[str, Any]:
    return {"model": "gang", "inputs": [{"text": text}]}


@dataclass
class Stream:
    """What a client saw of a stream."""

    replica: str
    events: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False

    @property
    def error(self) -> Any:
        return self.events[-1].get("error") if self.events else None


def read(cluster: Cluster, text: str, begun: Callable[[], None]) -> Stream:
    """A stream to its end. `begun` is called when its third event is there."""
    body = chat(text, stream=True, temperature=0, max_tokens=200, ignore_eos=True)
    with cluster.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.status_code == 200, reply.read()
        seen = Stream(reply.headers[REPLICA])
        for line in reply.iter_lines():
            if line == "data: [DONE]":
                seen.done = True
            elif line:
                seen.events.append(json.loads(line.removeprefix("data: ")))
                if len(seen.events) == 3:
                    begun()
    return seen


def test_each_prompt_has_its_replica_and_both_work(cluster: Cluster) -> None:
    with cluster.client() as client:
        asked = [client.post("/v1/predictive", json=predictive(f"Soup {n}.")) for n in range(12) for _ in range(2)]
        assert {reply.status_code for reply in asked} == {200}
        by = [reply.headers[REPLICA] for reply in asked]
        assert by[::2] == by[1::2] and {*by} == names(cluster) and len({*by}) == 2
        answers = [reply.json()["data"] for reply in asked]
        assert answers[::2] == answers[1::2]
        ids = [reply.json()["id"] for reply in asked]
        told = client.post("/v1/outcomes", json={"outcomes": [{"id": id, "correct": True} for id in ids]}).json()
        assert {each["status"] for each in told["data"]} == {"stored"}, "whichever replica gave the answer"


def test_a_key_is_asked_for(cluster: Cluster) -> None:
    assert httpx.post(f"{cluster.url}/v1/predictive", json=predictive("a")).status_code == 401
    assert httpx.get(f"{cluster.url}/metrics").status_code == 401
    assert httpx.get(f"{cluster.url}/ready").status_code == 200


def test_a_client_that_leaves_ends_the_work(cluster: Cluster) -> None:
    with cluster.client() as client:
        with client.stream(
            "POST", "/v1/chat/completions", json=chat("Tell me.", stream=True, max_tokens=900, ignore_eos=True)
        ) as reply:
            next(reply.iter_lines())
        wait_for(lambda: running(client.get("/metrics").text) == 0, "no request runs any more", 30)


def running(page: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if "num_requests_running{" in line)


@pytest.mark.parametrize("victim", ["server", "actor"])
def test_killing_one_loses_nothing_that_had_not_begun(cluster: Cluster, victim: str) -> None:
    wait_for(lambda: len(names(cluster)) == 2, "two replicas are ready", PATIENCE)
    before = names(cluster)
    begun, stop = threading.Barrier(7), threading.Event()
    acknowledged: list[str] = []

    def ask_and_report(number: int) -> int:
        asked = 0
        with cluster.client() as client:
            while not stop.is_set() or asked == 0:
                reply = client.post("/v1/predictive", json=predictive(f"{victim} {number} {asked % 5}"))
                assert reply.status_code == 200, reply.text
                asked += 1
                told = client.post("/v1/outcomes", json={"id": reply.json()["id"], "correct": True})
                if told.status_code == 200:
                    acknowledged.append(reply.json()["id"])
                else:  # of an answer that was on its way to the database: docs/outcomes.md
                    assert told.status_code == 404, told.text
        return asked

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        streams = [pool.submit(read, cluster, f"{n}: tell me a long story.", begun.wait) for n in range(6)]
        others = [pool.submit(ask_and_report, n) for n in range(4)]
        begun.wait(PATIENCE)
        server = cluster.servers()[0]
        target = server if victim == "server" else server.parent()
        assert target is not None
        killed = time.monotonic()
        os.kill(target.pid, signal.SIGKILL)
        seen = [each.result(PATIENCE) for each in streams]
        stop.set()
        asked = sum(each.result(PATIENCE) for each in others)
    broken = [each for each in seen if each.error]
    lost = {each.replica for each in broken}
    assert len(lost) == 1 < len({each.replica for each in seen}), "streams of one replica broke off"
    for each in seen:
        assert each.done != (each.replica in lost)
        if each.error:
            assert each.error["code"] == "unavailable" and each.error["type"] == "server_error"
    with sqlite3.connect(cluster.folder / "outcomes.db") as database:
        stored = {id for (id,) in database.execute("select distinct id from posterior_outcomes")}
    assert {*acknowledged} <= stored and acknowledged
    wait_for(lambda: len(names(cluster) - lost) == 2, "another replica takes the place of the lost one", PATIENCE)
    assert names(cluster) - before and not lost & names(cluster)
    print(
        f"{victim}: {len(broken)} of {len(seen)} streams broke off, {asked} other requests were answered, "
        f"{len(acknowledged)} outcomes acknowledged and all there; two replicas again after "
        f"{time.monotonic() - killed:.0f} s"
    )


def test_a_new_deployment_replaces_one_after_the_other(cluster: Cluster) -> None:
    """The name "gang" means another posterior then: clients see the old one or the new one, and no error."""
    wait_for(lambda: len(names(cluster)) == 2, "two replicas are ready", PATIENCE)
    old = names(cluster)
    seen: list[tuple[float, str]] = []
    stop = threading.Event()

    def ask(number: int) -> None:
        asked = 0
        with cluster.client() as client:
            while not stop.is_set():
                asked += 1
                reply = client.post("/v1/predictive", json=predictive(f"{number} {asked}"))
                assert reply.status_code == 200, reply.text
                seen.append((time.monotonic(), reply.json()["posterior"]))
                time.sleep(0.2)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, n) for n in range(2)]
        try:
            wait_for(lambda: len(seen) > 5, "answers of the old posterior", 60)
            cluster.deploy(arguments(cluster.folder / "new"))
            wait_for(lambda: len(names(cluster) - old) == 2, "both replicas are new", 2 * PATIENCE)
            wait_for(lambda: not old & names(cluster), "no old one is left", 120)
        finally:
            stop.set()
        for each in asking:
            each.result(PATIENCE)
    hashes = [posterior for _, posterior in seen]
    assert len({*hashes}) == 2 and hashes[0] != hashes[-1]
    gap = max(later - earlier for (earlier, _), (later, _) in zip(seen, seen[1:], strict=False))
    print(f"{len(seen)} requests while both were replaced, none failed; the longest time without an answer {gap:.1f} s")
