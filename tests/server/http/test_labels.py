"""Labels that the server asks for, and GET /v1/outcomes/report, over a fake engine and a SQLite file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.access.keys import Keys
from server.configuration.window import Window
from server.http.app import create_app
from server.services.monitor import Monitor
from server.services.predictive import Service
from server.store.store import Store
from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.http.asking import decide
from tests.server.http.sampling import DRAFTS
from tests.server.http.sampling import ask as sample
from tests.server.http.test_answers import events
from tests.server.http.test_outcomes import ANSWERS, TEXT, predict, report, rows
from tests.server.http.test_systemone import ask as systemone


@pytest.fixture
def engine() -> fakes.Engine:
    return fakes.Engine(max_model_len=4096)


@pytest.fixture(autouse=True)
def store(service: Service, tmp_path: Path) -> Iterator[Store]:
    """One whose server asks for the label of every answer."""
    mood: Any = service.registry.served["mood"].posterior
    mood.hash = "another"
    service.store = Store(f"sqlite:///{tmp_path}/outcomes.db", service.metrics, share=1.0)
    service.monitor = Monitor(service, service.store, Window())
    yield service.store
    service.store.close()


def test_every_kind_of_answer_says_that_its_label_is_asked_for(
    client: TestClient, store: Store, engine: fakes.Engine
) -> None:
    engine.drafts = DRAFTS
    given = predict(client, texts=["good", "bad"])
    asked = predict(client)
    decided, vllms = decide(client).json(), systemone(client).json()
    chosen = client.post("/v1/completions", json={"model": "gang", "prompt": "a", "uncertainty": ANSWERS}).json()
    sampled = sample(client).json()
    shown: list[tuple[str, list[Any]]] = [
        (given["id"], given["data"]),
        (asked["id"], asked["data"]),
        (decided["id"], [each["uncertainty"] for each in decided["answers"]]),
        (vllms["id"], [each["uncertainty"] for each in vllms["answers"].values()]),
        (chosen["id"], [each["uncertainty"] for each in chosen["choices"]]),
        (sampled["id"], [each["uncertainty"] for each in sampled["choices"]]),
    ]
    for id, records in shown:
        assert [each["label"] for each in records] == ["requested"] * len(records), id
        assert [row["requested"] for row in rows(client, store, id)] == [True] * len(records), id


@pytest.mark.parametrize("model", ["gang", "gang/map"])
def test_a_stream_says_it_at_the_end(client: TestClient, store: Store, model: str) -> None:
    chunks = events(client.post("/v1/completions", json={"model": model, "stream": True, **TEXT}))
    said = [choice.get("uncertainty") for chunk in chunks for choice in chunk["choices"]]
    assert said[-1]["label"] == "requested" and all("label" not in (each or {}) for each in said[:-1])
    assert [row["requested"] for row in rows(client, store, "x")] == [True]


def test_nothing_is_asked_where_nothing_is_kept(client: TestClient, service: Service) -> None:
    store, service.store = service.store, None
    assert all("label" not in each for each in predict(client)["data"])
    service.store = store


def test_the_report_is_of_the_outcomes(client: TestClient) -> None:
    id = predict(client)["id"]
    best = [each["answer"] for each in predict(client)["data"]]
    report(client, outcomes=[{"id": id, "answer": best[0]}, {"id": id, "index": 1, "correct": False}])
    found = client.get("/v1/outcomes/report").json()
    assert (found["object"], found["window"]) == ("outcomes.report", "1000")
    (own,) = found["data"]
    assert (own["predictive"], own["kind"]) == ("mixture", "answers")
    assert own["posterior"] == "gang@abcdef012345"
    assert own["outcomes"]["all"] == own["outcomes"]["requested"]
    assert (own["outcomes"]["all"]["n"], own["outcomes"]["all"]["accuracy"]["value"]) == (2, 0.5)
    assert own["labels"] == {"requested": 4, "reported": 2}
    assert own["drift"] == {} and own["exchangeability"] is None and set(own["missing"]) == {"drift", "exchangeability"}


def test_a_key_s_report_is_of_its_own_answers(service: Service, store: Store, tmp_path: Path) -> None:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("guest", "other")}
    entries = [f'[keys.{name}]\nsha256 = "{digest}"\nrequests_per_minute = 9\n' for name, digest in digests.items()]
    (tmp_path / "keys.toml").write_text("".join([*entries, 'models = ["mood"]\n']))
    (tmp_path / "keys.toml").chmod(0o600)
    app = create_app(service, Keys("boss", tmp_path / "keys.toml"))
    app.state.ready = True
    with TestClient(app) as client:
        for key, model in (("guest", "gang"), ("guest", "mood"), ("other", "mood"), ("boss", "mood")):
            client.headers["Authorization"] = f"Bearer {key}"
            predict(client, model=model)

        def seen(key: str) -> dict[str, int]:
            client.headers["Authorization"] = f"Bearer {key}"
            data = client.get("/v1/outcomes/report").json()["data"]
            return {each["posterior"].partition("@")[0]: each["labels"]["requested"] for each in data}

        assert (seen("guest"), seen("other")) == ({"gang": 2, "mood": 2}, {"mood": 2})
        assert seen("boss") == {"gang": 2, "mood": 6}
        for _ in range(6):
            seen("guest")
        assert error_of(client.get("/v1/outcomes/report", headers={"Authorization": "Bearer guest"}), 429)


def test_a_report_that_cannot_be_read_is_a_503(client: TestClient, store: Store) -> None:
    store.close()
    response = client.get("/v1/outcomes/report")
    assert error_of(response, 503)["code"] == "unavailable" and int(response.headers["retry-after"]) > 0
