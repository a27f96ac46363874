"""Hot load on the real server: vLLM serves what is loaded, under the right name, while others ask."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from posterior.evaluation.probing import probe
from posterior.storage.artefact import Posterior
from tests.server import folders
from tests.server.running import KEY, Running

HEADERS = {"Authorization": f"Bearer {KEY}"}
INPUTS = [{"text": text} for text in ("The food was wonderful.", "I waited an hour and left hungry.", "ok")]


class Admin:
    """The server's posteriors and aliases, with the key of an admin."""

    def __init__(self, server: Running) -> None:
        self.server, self.root = server, server.cache.parent / "posteriors"
        self.client = httpx.Client(base_url=server.url, headers=HEADERS, timeout=120)

    def put(self, posterior: Posterior, name: str) -> None:
        """A copy of a folder in the place of the one of this name."""
        shutil.copytree(posterior.path, self.root / f".{name}")
        shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / f".{name}").rename(self.root / name)

    def load(self, name: str, status: int = 200) -> Any:
        reply = self.client.post("/v1/posteriors", json={"name": name})
        assert reply.status_code == status, reply.text
        return reply.json()

    def delete(self, path: str) -> Any:
        reply = self.client.delete(path)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def alias(self, name: str, label: str) -> None:
        assert self.client.put(f"/v1/aliases/{name}", json={"posterior": label}).status_code == 200

    def answers(self, model: str, predictive: str = "mixture") -> tuple[str, list[float]]:
        """The posterior that answered, and the probability of the first answer to each input."""
        reply = self.server.predict(model=model, inputs=INPUTS, predictive=predictive)
        return reply["posterior"], [item["answers"][0]["probability"] for item in reply["data"]]


@pytest.fixture
def admin(server: Running) -> Iterator[Admin]:
    """Afterwards the server serves what it did before."""
    admin = Admin(server)
    yield admin
    for alias in admin.client.get("/v1/aliases").json()["data"]:
        admin.delete(f"/v1/aliases/{alias['id']}")
    for card in admin.client.get("/v1/posteriors").json()["data"]:
        if card["name"] not in ("gang", "mood") and card["state"] == "loaded":
            admin.delete(f"/v1/posteriors/{card['id']}")
    (admin.root / "aliases.json").unlink(missing_ok=True)
    shutil.rmtree(admin.root / "hot", ignore_errors=True)
    admin.client.close()


@pytest.fixture(scope="module")
def versions(server: Running, tmp_path_factory: pytest.TempPathFactory) -> tuple[Posterior, Posterior]:
    """Two posteriors for the folder "hot", of which the first has probes."""
    root = tmp_path_factory.mktemp("versions")
    first = folders.particles(root, server.base, name="a", seed=100)
    rows = [{**row, "label": label} for row, label in zip(INPUTS, (1, 0, 1), strict=True)]
    probe(first, rows, base=str(server.base.path))
    return first, folders.particles(root, server.base, name="b", seed=200)


def test_versions_come_and_go_under_requests(admin: Admin, versions: tuple[Posterior, Posterior]) -> None:
    """Every answer is that of the posterior which it names, and the same after it was unloaded and loaded again."""
    first, second = versions
    admin.put(first, "hot")
    card = admin.load("hot")
    assert card["memory"]["adapters"] == 4 and card["self_test"]["difference"] < card["self_test"]["tolerance"] == 0.005
    a = admin.answers("hot")
    assert a[0] == card["id"]
    admin.alias("live", card["id"])
    admin.put(second, "hot")
    expected, seen, stop = {a[0]: a[1]}, list[tuple[str, list[float]]](), threading.Event()

    def ask(model: str) -> None:
        while not stop.is_set():
            seen.append(admin.answers(model))

    clients = [threading.Thread(target=ask, args=(model,)) for model in ("hot", "live")]
    for client in clients:
        client.start()
    try:
        b = admin.load("hot")["id"]
        expected[b] = admin.answers(b)[1]
        admin.alias("live", b)
        gone = admin.delete(f"/v1/posteriors/{a[0]}")
        assert gone["id"] == a[0] and admin.answers("live") == admin.answers("hot")
    finally:
        stop.set()
        for client in clients:
            client.join()
    assert {label for label, _ in seen} == {a[0], b}
    for label, answers in seen:
        assert answers == pytest.approx(expected[label], abs=1e-4), label
    assert max(abs(x - y) for x, y in zip(expected[a[0]], expected[b], strict=True)) > 0.01
    admin.put(first, "hot")
    again = admin.load("hot")
    assert again["id"] == a[0] and admin.answers(a[0])[1] == pytest.approx(a[1], abs=1e-4)
    assert admin.answers("live")[0] == b, "the alias stays where it is"


@pytest.mark.long
def test_a_stream_goes_on_with_what_was_unloaded(admin: Admin, versions: tuple[Posterior, Posterior]) -> None:
    admin.put(versions[0], "hot")
    label = admin.load("hot")["id"]
    body = {"model": "hot", "prompt": "It was", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    whole = admin.server.post("/v1/completions", **body)["choices"][0]["text"]
    text = ""
    with admin.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        lines = reply.iter_lines()
        first = next(lines)
        gone = admin.delete(f"/v1/posteriors/{label}")
        assert gone["requests"] == 1 and first.startswith("data: ")
        assert admin.client.post("/v1/completions", json=body).status_code == 404
        for line in (first, *lines):
            if line.startswith("data: {"):
                assert '"error"' not in line
                text += httpx.Response(200, text=line.removeprefix("data: ")).json()["choices"][0]["text"]
    assert text == whole


@pytest.mark.long
def test_a_laplace_posterior_brings_its_linearised_predictive(admin: Admin, tmp_path: Path) -> None:
    """The worker holds two covariances of the same name for a while, each with its own."""
    server = admin.server
    admin.put(folders.laplace(tmp_path, server.base, precision=100.0, name="wide"), "hot")
    wide = admin.load("hot")["id"]
    wider = admin.answers(wide, "linearized")
    admin.put(server.mood, "hot")
    same = admin.load("hot")["id"]
    assert admin.answers("hot", "linearized")[1] == pytest.approx(admin.answers("mood", "linearized")[1], abs=1e-6)
    assert admin.answers(wide, "linearized") == wider
    assert admin.answers(wide, "map")[1] == pytest.approx(admin.answers(same, "map")[1], abs=1e-5)
    assert max(abs(x - y) for x, y in zip(wider[1], admin.answers(same, "linearized")[1], strict=True)) > 1e-3


def test_what_cannot_be_served_changes_nothing(admin: Admin, versions: tuple[Posterior, Posterior]) -> None:
    before = admin.client.get("/v1/posteriors").json()
    admin.put(versions[0], "hot")
    path = admin.root / "hot" / "particles" / "001" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "sha256 differs" in admin.load("hot", 409)["error"]["message"]
    assert admin.load("nobody", 404)["error"]["code"] == "not_found"
    after = admin.client.get("/v1/posteriors").json()
    listed = [[card["id"] for card in each["data"] if card["state"] == "loaded"] for each in (before, after)]
    assert listed[0] == listed[1]
