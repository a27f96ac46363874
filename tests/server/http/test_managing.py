"""/v1/posteriors and /v1/aliases over HTTP: who may, what is answered, and what keys see of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from posterior.models.base import Base
from server.access.keys import Keys
from server.http.app import create_app
from server.services import lifecycle as module
from tests.server import folders
from tests.server.conftest import error_of
from tests.server.services.managed import Managed, base_in

ASK = {"inputs": [{"text": "good"}], "predictive": "mixture"}


@pytest.fixture
def managed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Managed:
    monkeypatch.setattr(module, "GRACE", 0.01)
    base: Base = base_in(tmp_path)
    folders.laplace(tmp_path / "root", base)
    folders.particles(tmp_path / "root", base)
    return Managed(tmp_path / "root", base, max_model_len=4096)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Keys that are their names."""
    rights = {"admin": "admin = true", "gang": 'models = ["gang"]', "live": 'models = ["live"]', "all": ""}
    tables = [
        f'[keys.{name}]\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n{right}\n'
        for name, right in rights.items()
    ]
    (tmp_path / "keys.toml").write_text("".join(tables))
    return Keys(None, tmp_path / "keys.toml")


@pytest.fixture
def client(managed: Managed, keys: Keys) -> Iterator[TestClient]:
    app = create_app(managed.service, keys)
    app.state.ready = True
    with TestClient(app, raise_server_exceptions=False, headers={"Authorization": "Bearer admin"}) as client:
        yield client


def ask(client: TestClient, key: str, model: str) -> Any:
    return client.post("/v1/predictive", json={"model": model, **ASK}, headers={"Authorization": f"Bearer {key}"})


CALLS = [
    ("GET", "/v1/posteriors", None),
    ("POST", "/v1/posteriors", {"name": "gang"}),
    ("DELETE", "/v1/posteriors/gang", None),
    ("GET", "/v1/aliases", None),
    ("PUT", "/v1/aliases/live", {"posterior": "gang"}),
    ("DELETE", "/v1/aliases/live", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
def test_only_admins_may(client: TestClient, managed: Managed, method: str, path: str, body: Any) -> None:
    before = managed.names()
    for key, status in (("all", 403), ("gang", 403), ("nobody", 401)):
        reply = client.request(method, path, json=body, headers={"Authorization": f"Bearer {key}"})
        assert error_of(reply, status)
    app: Any = client.app
    app.state.ready = False
    assert error_of(client.request(method, path, json=body), 503)
    assert managed.names() == before and not managed.lifecycle.aliases


def test_a_posterior_is_loaded_asked_and_unloaded(client: TestClient, managed: Managed) -> None:
    new = folders.particles(managed.root, managed.base, name="new", seed=9)
    assert ask(client, "all", "new").status_code == 404
    card = client.post("/v1/posteriors", json={"name": "new"}).json()
    assert card["id"] == f"new@{new.hash[:12]}" and card["hash"] == new.hash and card["models"] == ["new", "new/map"]
    numbers = sum(value.numel() for value in folders.random_theta(managed.base, 0).values())
    bytes = 2 * numbers  # the fake engine computes in bfloat16
    assert card["memory"] == {"adapters": 4, "bytes_per_adapter": bytes, "bytes": 4 * bytes}
    assert (card["state"], card["particles"], card["requests"], card["self_test"]) == ("loaded", 3, 0, None)
    assert "has no probes" in card["notes"][0]
    answer = ask(client, "all", "new").json()
    assert (answer["model"], answer["posterior"], answer["particles"]) == ("new", card["id"], 3)
    listed = client.get("/v1/posteriors").json()
    assert [each["id"].partition("@")[0] for each in listed["data"]] == ["gang", "mood", "new"]
    assert listed["room"] == {"slots": 9, "places": 40, "adapters": 13, "bytes": 13 * bytes} and listed["refused"] == {}
    assert "new" in [each["id"] for each in client.get("/v1/models").json()["data"]]
    gone = client.delete("/v1/posteriors/new").json()
    assert gone == {"id": card["id"], "object": "posterior.deleted", "deleted": True, "requests": 0}
    assert error_of(ask(client, "all", "new"), 404)["code"] == "model_not_found"
    assert error_of(client.delete("/v1/posteriors/new"), 404)["code"] == "not_found"


def test_every_request_leaves_what_it_used(client: TestClient, managed: Managed) -> None:
    """However it ends: else what is unloaded would never be forgotten."""
    users = managed.service.find("gang").users
    assert ask(client, "all", "gang").status_code == 200 and users.count == 0
    chat = {"model": "gang", "messages": [{"role": "user", "content": "hello"}]}
    assert client.post("/v1/chat/completions", json=chat).status_code == 200 and users.count == 0
    with client.stream("POST", "/v1/chat/completions", json={**chat, "stream": True}) as reply:
        assert list(reply.iter_lines())
    assert users.count == 0
    assert client.post("/v1/chat/completions", json={**chat, "n": 0}).status_code == 400 and users.count == 0
    managed.engine.failure = RuntimeError("a fault")
    assert ask(client, "all", "gang").status_code == 500 and users.count == 0


def test_a_key_sees_what_its_names_lead_to(client: TestClient, managed: Managed) -> None:
    """A key of an alias may not use the posterior by its own name, nor one of the posterior the alias."""
    assert ask(client, "live", "live").status_code == 404
    alias = client.put("/v1/aliases/live", json={"posterior": "gang"}).json()
    label = managed.label("gang")
    assert alias == {"id": "live", "object": "alias", "posterior": label, "previous": None, "loaded": True}
    answer = ask(client, "live", "live").json()
    assert (answer["model"], answer["posterior"]) == ("live", label)
    for key, allowed in (("live", ["live", "live/map"]), ("gang", ["gang", "gang/map"])):
        cards = client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).json()["data"]
        assert [card["id"] for card in cards] == allowed
    assert ask(client, "live", "gang").status_code == ask(client, "gang", "live").status_code == 404
    assert ask(client, "live", label).status_code == 404 and ask(client, "gang", label).status_code == 200
    moved = client.put("/v1/aliases/live", json={"posterior": "mood"}).json()
    assert moved["previous"] == label and ask(client, "live", "live").json()["posterior"].startswith("mood@")
    assert ask(client, "live", f"live@{label.partition('@')[2]}").status_code == 404, "it leads there no more"
    assert client.put("/v1/aliases/live", json={"rollback": True}).json()["posterior"] == label
    card = client.get("/v1/models/live").json()
    assert (card["root"], card["family"]) == (label, "particles")
    assert client.get("/v1/aliases").json()["data"][0]["previous"].startswith("mood@")
    assert error_of(client.delete("/v1/posteriors/gang"), 409)["code"] == "conflict"
    assert client.delete("/v1/aliases/live").json() == {"id": "live", "object": "alias.deleted", "deleted": True}
    assert ask(client, "live", "live").status_code == 404 and client.get("/v1/aliases").json()["data"] == []


def test_a_version_without_a_name_is_of_the_same_keys(client: TestClient, managed: Managed) -> None:
    old = managed.label("gang")
    folders.particles(managed.root, managed.base, seed=50)
    new = client.post("/v1/posteriors", json={"name": "gang"}).json()
    assert new["id"] != old and [each["models"] for each in client.get("/v1/posteriors").json()["data"]][0] == []
    assert ask(client, "gang", "gang").json()["posterior"] == new["id"]
    assert ask(client, "gang", old).json()["posterior"] == old
    assert ask(client, "live", old).status_code == 404
    assert error_of(client.delete("/v1/posteriors/gang"), 409)
    assert client.delete(f"/v1/posteriors/{old}").json()["id"] == old
    assert ask(client, "gang", old).status_code == 404 and ask(client, "gang", "gang").status_code == 200


BODIES: list[tuple[str, str, Any, str]] = [
    ("POST", "/v1/posteriors", {}, "'name' is required"),
    ("POST", "/v1/posteriors", {"name": 5}, "name"),
    ("POST", "/v1/posteriors", {"name": "gang", "path": "/etc"}, "unknown field 'path'"),
    ("POST", "/v1/posteriors", {"name": "../gang"}, "is no name of a posterior"),
    ("POST", "/v1/posteriors", [], "JSON object"),
    ("PUT", "/v1/aliases/live", {}, "give exactly one"),
    ("PUT", "/v1/aliases/live", {"posterior": "gang", "rollback": True}, "give exactly one"),
    ("PUT", "/v1/aliases/live", {"rollback": False}, "rollback"),
    ("PUT", "/v1/aliases/tiny", {"posterior": "gang"}, "cannot be an alias"),
]


@pytest.mark.parametrize(("method", "path", "body", "words"), BODIES)
def test_bad_bodies(client: TestClient, managed: Managed, method: str, path: str, body: Any, words: str) -> None:
    before = managed.names()
    assert words in error_of(client.request(method, path, json=body), 400)["message"]
    assert managed.names() == before


def test_a_server_without_folders_says_so(service: Any) -> None:
    app = create_app(service, None)
    app.state.ready = True
    with TestClient(app) as client:
        assert "loads no posteriors" in error_of(client.get("/v1/posteriors"), 404)["message"]
