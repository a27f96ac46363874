"""POST /v1/outcomes over a fake engine and a SQLite file: what is kept of each kind of answer, and what is said."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from server.access.keys import Keys
from server.http.app import create_app
from server.services.predictive import Service
from server.store import tables
from server.store.store import Store
from tests.server import fakes
from tests.server.conftest import error_of
from tests.server.http import test_rightness as rightness
from tests.server.http.asking import answers as decided
from tests.server.http.asking import decide
from tests.server.http.sampling import DRAFTS
from tests.server.http.sampling import ask as sample
from tests.server.http.test_answers import events
from tests.server.http.test_refusals import with_risk
from tests.server.http.test_samples import logprob
from tests.server.http.test_systemone import QUESTIONS
from tests.server.http.test_systemone import ask as systemone
from tests.server.services.test_calibrated import give, record

TEXT = {"prompt": "it was", "temperature": 0.0}
ANSWERS = {"answers": ["no", "yes", "maybe"]}


@pytest.fixture
def engine() -> fakes.Engine:
    return fakes.Engine(max_model_len=4096)


@pytest.fixture(autouse=True)
def store(service: Service, tmp_path: Path) -> Iterator[Store]:
    service.store = store = Store(f"sqlite:///{tmp_path}/there/outcomes.db", service.metrics)
    yield store
    store.close()


def predict(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/predictive", json={"model": "gang", "inputs": [{"text": "a"}, {"text": "b"}], **body})
    assert response.status_code == 200, response.text
    return dict(response.json())


def report(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/outcomes", json=body)


def rows(client: TestClient, store: Store, id: str) -> list[dict[str, Any]]:
    """What is stored of the answers of a reply, by their index."""
    report(client, id="settled", correct=True)  # what waits is written before it
    with store._engine.connect() as connection:
        joined = tables.answers.join(tables.replies)
        query = select(tables.replies, tables.answers).select_from(joined).where(tables.answers.c.id == id)
        return [dict(row) for row in connection.execute(query.order_by(tables.answers.c.item)).mappings()]


def same(row: dict[str, Any], shown: dict[str, Any]) -> None:
    """A stored answer is the one that the reply shows."""
    candidates = shown["answers"]
    assert row["options"] == [each["answer"] for each in candidates]
    assert row["probability"] == [each.get("uncalibrated", each["probability"]) for each in candidates]
    assert [type(option) for option in row["options"]] == [type(each["answer"]) for each in candidates]
    assert row["options"][row["best"]] == shown["answer"] and row["confidence"] == shown["confidence"]
    names = ("predictive", "particles", "calibrated", "familiarity")
    assert [row[name] for name in names] == [shown.get(name) for name in names]
    assert (row["total"], row["epistemic"]) == (shown["entropy"]["total"], shown["entropy"]["epistemic"])


def test_what_is_kept_of_a_predictive(client: TestClient, store: Store, service: Service) -> None:
    reply = predict(client)
    stored = rows(client, store, reply["id"])
    for row, shown in zip(stored, reply["data"], strict=True):
        same(row, shown)
        assert (row["kind"], row["dtype"], row["model"], row["posterior"]) == ("answers", "bfloat16", "gang", "gang")
        assert (row["hash"], row["base"], row["request"]) == ("abcdef0123456789", "sha256:00", None)
        assert row["key"]["template"] and row["key"]["predictive"] == "mixture" and row["key"]["particles"] == 3
    posterior = predict(client, model="mood")
    assert rows(client, store, posterior["id"])[0]["dtype"] == "float32", "of the linearised predictive's worker"
    alone = predict(client, model="gang/map", inputs=None, prompts=["a"])
    assert [(row["model"], row["key"]) for row in rows(client, store, alone["id"])] == [("gang/map", None)]
    some = predict(client, particles="auto")
    assert rows(client, store, some["id"])[0]["key"] is None, "no calibration is of as many as needed"


def test_what_is_kept_of_a_calibrated_answer(client: TestClient, store: Store, service: Service) -> None:
    give(service, record())
    reply = predict(client, model="mood", predictive="mixture", particles=3, coverage=0.5)
    (row, _), (shown, _) = rows(client, store, reply["id"]), reply["data"]
    same(row, shown)
    assert row["calibrated"] and row["coverage"] == 0.5 and row["key"] == record().key.model_dump()
    assert [row["options"][number] for number in row["prediction_set"]] == shown["prediction_set"]


def test_what_is_kept_of_decisions(client: TestClient, store: Store) -> None:
    reply = decide(client).json()
    stored = rows(client, store, reply["id"])
    assert [row["kind"] for row in stored] == ["predicate", "choice", "score"]
    for row, shown in zip(stored, reply["answers"], strict=True):
        same(row, shown["uncertainty"])
        assert (row["max_risk"], row["refusal"], row["key"]) == (None, None, None)
    own = [{"id": reply["id"], "index": n, "answer": answer} for n, answer in enumerate((True, True, 1))]
    wrong = [{"id": reply["id"], "index": n, "answer": answer} for n, answer in enumerate(("true", "glad?", 2))]
    done = report(client, outcomes=[*wrong, *own]).json()["data"]
    assert [each["status"] for each in done] == ["invalid"] * 3 + ["stored"] * 3
    assert "'glad', 'true', True" in done[1]["message"]
    best = [row["options"][row["best"]] for row in stored]
    expected = [type(b) is type(o["answer"]) and b == o["answer"] for b, o in zip(best, own, strict=True)]
    assert [each["correct"] for each in done[3:]] == expected


def test_what_is_kept_of_a_refusal(client: TestClient, store: Store, service: Service) -> None:
    tops = sorted(max(each["probability"] for each in one["uncertainty"]["answers"]) for one in decided(client))
    with_risk(400, service, split=(tops[0] + tops[-1]) / 2)
    reply = decide(client, uncertainty={"max_risk": 0.05}).json()
    stored = rows(client, store, reply["id"])
    for row, shown in zip(stored, reply["answers"], strict=True):
        same(row, shown["uncertainty"])
        assert (row["max_risk"], row["refusal"]) == (0.05, shown["uncertainty"].get("reason"))
        assert row["key"]["question"] == row["kind"]
    assert {row["refusal"] is None for row in stored} == {True, False}, "the case must hold both"


def test_what_is_kept_of_vllm_s_decisions(client: TestClient, store: Store) -> None:
    reply = systemone(client, request_id="mine").json()
    stored = rows(client, store, "decision-mine")
    for row, name in zip(stored, QUESTIONS, strict=True):
        same(row, reply["answers"][name]["uncertainty"])
    assert report(client, id="decision-mine", index=2, answer=1).json()["data"][0]["status"] == "stored"


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_kept_of_choices(client: TestClient, store: Store, stream: bool) -> None:
    body = {"model": "gang", "prompt": ["a", "b"], "uncertainty": ANSWERS, "temperature": 1.0, "n": 2, "stream": stream}
    response = client.post("/v1/completions", json=body)
    chunks = events(response) if stream else [response.json()]
    shown = [choice for chunk in chunks for choice in chunk["choices"] if choice.get("finish_reason")]
    stored = rows(client, store, chunks[0]["id"])
    assert len(stored) == 4
    for row, choice in zip(stored, shown, strict=True):
        same(row, choice["uncertainty"])
        assert (row["kind"], row["key"]) == ("answers", None)


def features(log_p: float, tokens: int) -> dict[str, float]:
    """Of a text whose every token has an entropy of 1, of which 0.25 are epistemic."""
    return {
        "mean_logprob": log_p / tokens, "logprob": log_p, "entropy": 1.0, "epistemic": 0.25,
        "length": math.log(tokens),
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_kept_of_text(client: TestClient, store: Store, path: str, stream: bool) -> None:
    said = TEXT if path == "/v1/completions" else {"messages": [{"role": "user", "content": "was it?"}]}
    response = client.post(path, json={"model": "gang", "stream": stream, **said})
    assert response.status_code == 200 and response.text
    (row,) = rows(client, store, "x")
    assert (row["kind"], row["predictive"], row["particles"], row["dtype"]) == ("text", "mixture", 3, "bfloat16")
    assert (row["options"], row["best"], row["confidence"], row["calibrated"]) == (None, None, None, False)
    assert (row["total"], row["epistemic"]) == (1.0, 0.25)
    assert row["features"] == pytest.approx({**features(math.log(0.5), 1), "information": 0.0})
    error = error_of(report(client, id="x", answer="hello"), 400)
    assert error["message"] == "this answer is a text, which has no options; report 'correct'"
    (done,) = report(client, id="x", correct=False).json()["data"]
    assert done == {"id": "x", "index": 0, "status": "stored", "correct": False}


def test_what_is_kept_of_text_by_one_adapter(client: TestClient, store: Store) -> None:
    client.post("/v1/completions", json={"model": "gang/map", **TEXT})
    (row,) = rows(client, store, "x")
    assert (row["model"], row["predictive"], row["particles"], row["features"]) == ("gang/map", "map", 1, None)


def test_what_is_kept_of_whether_text_is_right(client: TestClient, store: Store, service: Service) -> None:
    rightness.give(service, rightness.record())
    for risk, reason in ((None, None), (0.2, "ambiguous")):
        shown = rightness.told(rightness.write(client, uncertainty={"max_risk": risk}))
        assert (shown.get("abstain"), shown.get("reason")) == (None if risk is None else True, reason)
        (row,) = rows(client, store, "x")
        assert row["calibrated"] and row["confidence"] == shown["confidence"] == pytest.approx(rightness.HELLO)
        assert (row["max_risk"], row["refusal"]) == (risk, reason)
        assert math.exp(row["features"]["mean_logprob"]) == pytest.approx(shown["mean_token_probability"])
        assert client.delete("/v1/outcomes/x").status_code == 200


def test_what_is_kept_of_whether_a_sampled_text_is_right(
    client: TestClient, store: Store, service: Service, engine: fakes.Engine
) -> None:
    engine.drafts = DRAFTS
    rightness.give(service, rightness.record(text="meaning", **rightness.SAMPLES))
    shown = rightness.told(sample(client))
    (row,) = rows(client, store, "x")
    assert row["calibrated"] and row["confidence"] == shown["confidence"] is not None


def test_what_is_kept_of_texts_that_were_given(client: TestClient, store: Store, service: Service) -> None:
    rightness.give(service, rightness.record(text="given"))
    reply = predict(client, texts=["good", "bad"])
    stored = rows(client, store, reply["id"])
    for row, shown in zip(stored, reply["data"], strict=True):
        assert (row["kind"], row["predictive"], row["particles"], row["options"]) == ("text", "mixture", 3, None)
        assert row["calibrated"] and row["confidence"] == shown["confidence"]
        assert row["features"]["logprob"] == pytest.approx(shown["logprob"])
        assert row["key"] == rightness.KEY.model_copy(update={"text": "given"}).model_dump()
    other = predict(client, texts=["good", "bad"], mixing="token")
    assert [row["key"] for row in rows(client, store, other["id"])] == [None, None], "no calibration is of token mixing"


def test_nothing_is_kept_of_the_base_s_text(client: TestClient, store: Store) -> None:
    client.post("/v1/completions", json={"model": fakes.BASE.id, **TEXT})
    assert rows(client, store, "x") == []
    reply = predict(client, model=fakes.BASE.id, inputs=None, prompts=["a"], texts=["good"])
    assert rows(client, store, reply["id"]) == []


@pytest.mark.parametrize(("temperature", "text"), [(0.0, "greedy"), (0.7, None)])
def test_a_text_belongs_to_the_record_that_is_of_such_texts(
    client: TestClient, store: Store, temperature: float, text: str | None
) -> None:
    client.post("/v1/completions", json={"model": "gang", **TEXT, "temperature": temperature})
    (row,) = rows(client, store, "x")
    assert row["key"] == (None if text is None else rightness.KEY.model_dump())


@pytest.mark.parametrize(
    ("returned", "stream"), [("meaning", False), ("meaning", True), ("greedy", False), ("greedy", True)]
)
def test_what_is_kept_of_text_with_samples(
    client: TestClient, store: Store, engine: fakes.Engine, returned: str, stream: bool
) -> None:
    engine.drafts = DRAFTS
    response = sample(client, uncertainty={"return": returned}, stream=stream)
    chunks = events(response) if stream else [response.json()]
    (shown,) = [choice["uncertainty"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    (row,) = rows(client, store, "x")
    assert row["key"] == rightness.KEY.model_copy(update={"text": returned, **rightness.SAMPLES}).model_dump()
    found, meanings = row["features"], shown["semantic"]
    number, tokens = (3, len(DRAFTS[3].log_p)) if returned == "meaning" else (None, 1)
    log_p = math.log(0.5) if number is None else logprob(number)
    assert found == pytest.approx({
        **features(log_p, tokens),
        "information": shown["information"],
        "semantic_entropy": meanings["entropy"]["total"],
        "semantic_epistemic": meanings["entropy"]["epistemic"],
        "largest_meaning": meanings["meanings"][0]["probability"],
        "own_meaning": 0.0 if meanings["own"] is None else meanings["meanings"][meanings["own"]]["probability"],
    })  # fmt: skip


def test_what_is_said_of_one_outcome(client: TestClient) -> None:
    id = predict(client)["id"]
    error = error_of(report(client, id=id, answer="good"), 400)
    assert error["message"] == "'good' is none of this question's options: ' negative', ' positive'"
    for body in ({"id": id, "index": 2}, {"id": "pred-other"}):
        assert error_of(report(client, **body, correct=True), 404)["code"] == "answer_not_found"
    assert report(client, id=id, index=1, answer=" positive").json()["object"] == "outcomes"
    (done,) = report(client, id=id, index=1, answer=" positive").json()["data"]
    assert (done["id"], done["index"], done["status"]) == (id, 1, "known") and "message" not in done
    other = report(client, id=id, index=1, answer=" negative")
    assert error_of(other, 409)["code"] == "outcome_conflict" and other.headers["x-should-retry"] == "false"


def test_of_many_each_is_taken_by_itself(client: TestClient, service: Service) -> None:
    id = predict(client)["id"]
    many = [
        {"id": id, "answer": " positive"}, {"id": id, "answer": " negative"}, {"id": "pred-other", "correct": True},
        {"id": id, "index": 1, "answer": "x"}, {"id": id, "index": 1, "correct": False}, {"id": id, "correct": True},
    ]  # fmt: skip
    data = report(client, outcomes=many).json()["data"]
    last = "known" if data[0]["correct"] else "conflict"
    assert [each["status"] for each in data] == ["stored", "conflict", "unknown", "invalid", "stored", last]
    assert ["message" in each for each in data] == [False, True, True, True, False, last == "conflict"]
    value = service.metrics.registry.get_sample_value
    counted = {status: value("posterior_outcomes_total", {"posterior": "gang", "status": status}) for status in (
        "stored", "conflict", "invalid")}  # fmt: skip
    assert counted == {"stored": 2, "conflict": 2 if last == "conflict" else 1, "invalid": 1}
    assert value("posterior_outcomes_total", {"posterior": "none", "status": "unknown"}) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "id"),
        ({"id": "x"}, None),
        ({"id": "x", "answer": "a", "correct": True}, None),
        ({"id": "x", "correct": 1}, "correct"),
        ({"id": "x", "answer": 1.0}, "answer"),
        ({"id": "x", "answer": ["a"]}, "answer"),
        ({"id": "", "correct": True}, "id"),
        ({"id": "x" * 257, "correct": True}, "id"),
        ({"id": "x", "index": -1, "correct": True}, "index"),
        ({"id": "x", "index": 2**31, "correct": True}, "index"),
        ({"id": "x", "correct": True, "value": 1}, "value"),
        ({"outcomes": []}, "outcomes"),
        ({"outcomes": [{"id": "x", "correct": True}] * 1001}, "outcomes"),
        ({"outcomes": [{"id": "x", "correct": True}, {"id": "x"}]}, "outcomes.1"),
        ({"outcomes": [{"id": "x", "correct": True}], "id": "x"}, "id"),
    ],
)
def test_a_wrong_body_is_refused_whole(client: TestClient, body: dict[str, Any], param: str | None) -> None:
    error = error_of(client.post("/v1/outcomes", json=body), 400)
    assert error["param"] == param, error


def test_deletion(client: TestClient, store: Store) -> None:
    reply = systemone(client, request_id="a/b c").json()
    assert len(rows(client, store, reply["id"])) == 3
    gone = client.delete(f"/v1/outcomes/{reply['id']}")
    assert gone.json() == {"id": "decision-a/b c", "object": "outcomes.deleted", "deleted": True}
    assert rows(client, store, reply["id"]) == []
    assert error_of(client.delete(f"/v1/outcomes/{reply['id']}"), 404)["code"] == "answer_not_found"
    assert error_of(client.delete("/v1/outcomes/%00"), 404)["code"] == "answer_not_found"


def test_answers_belong_to_the_key_that_got_them(service: Service, store: Store, tmp_path: Path) -> None:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("first", "second")}
    entries = [f'[keys.{name}]\nsha256 = "{digest}"\n' for name, digest in digests.items()]
    (tmp_path / "keys.toml").write_text("".join(entries))
    app = create_app(service, Keys(None, tmp_path / "keys.toml"))
    app.state.ready = True
    first, second = (TestClient(app, headers={"Authorization": f"Bearer {name}"}) for name in digests)
    id = predict(first)["id"]
    error_of(report(second, id=id, correct=True), 404)
    error_of(second.delete(f"/v1/outcomes/{id}"), 404)
    assert report(first, id=id, correct=True).status_code == 200
    assert rows(first, store, id)[0]["owner"] == digests["first"]
    error_of(TestClient(first.app).post("/v1/outcomes", json={"id": id, "correct": True}), 401)


def test_an_admin_reports_on_every_key_s_answers(service: Service, store: Store, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(f'[keys.guest]\nsha256 = "{hashlib.sha256(b"guest").hexdigest()}"\n')
    (tmp_path / "keys.toml").chmod(0o600)
    app = create_app(service, Keys("boss", tmp_path / "keys.toml"))
    app.state.ready = True
    boss, guest = (TestClient(app, headers={"Authorization": f"Bearer {key}"}) for key in ("boss", "guest"))
    id, own = predict(guest)["id"], predict(boss)["id"]
    assert report(boss, id=id, correct=True).json()["data"][0]["status"] == "stored"
    assert report(guest, id=id, correct=True).json()["data"][0]["status"] == "known"
    error_of(report(guest, id=own, correct=True), 404)
    error_of(guest.delete(f"/v1/outcomes/{own}"), 404)
    assert boss.delete(f"/v1/outcomes/{id}").json()["deleted"] is True and rows(boss, store, id) == []


def test_requests_are_kept_where_that_was_asked_for(client: TestClient, store: Store) -> None:
    assert rows(client, store, predict(client)["id"])[0]["request"] is None
    store.requests = True
    body = {"model": "gang", "inputs": [{"text": "a"}, {"text": "b"}]}
    assert rows(client, store, predict(client)["id"])[0]["request"] == body
    chat = {"model": "gang", "messages": [{"role": "user", "content": "was it?"}], "uncertainty": {"tokens": True}}
    client.post("/v1/chat/completions", json=chat)
    assert rows(client, store, "x")[0]["request"] == chat


def test_without_a_database_answers_go_on(client: TestClient, store: Store, service: Service, tmp_path: Path) -> None:
    id = predict(client)["id"]
    assert report(client, id=id, correct=True).status_code == 200
    (tmp_path / "there").rename(tmp_path / "away")
    lost = predict(client)["id"]
    for response in (report(client, id=id, correct=True), client.delete(f"/v1/outcomes/{id}")):
        assert error_of(response, 503)["code"] == "unavailable" and int(response.headers["retry-after"]) > 0
    assert service.metrics.registry.get_sample_value("posterior_answers_dropped_total") == 2
    (tmp_path / "away").rename(tmp_path / "there")
    assert report(client, id=id, correct=True).json()["data"][0]["status"] == "known"
    error_of(report(client, id=lost, correct=True), 404)


def test_a_server_that_keeps_nothing_says_so(client: TestClient, service: Service) -> None:
    service.store = None
    assert predict(client)["data"] and len(decided(client)) == 3
    for response in (
        report(client, id="x", correct=True), client.delete("/v1/outcomes/x"), client.get("/v1/outcomes/report")
    ):  # fmt: skip
        error = error_of(response, 404)
        assert (error["code"], "--outcomes" in error["message"]) == ("answer_not_found", True)
