"""What clients get of the front when replicas answer, are lost, or refuse."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Collection
from typing import Any

import httpx
import openai
import pytest

from server.http import schemas
from server.replicas import front
from server.replicas.messages import Busy, Forwarded, Head
from tests.server.replicas.conftest import EVENTS, Scripted, both, lost, said, streamed

pytestmark = pytest.mark.asyncio
ASKED = {"x": 1}
ONE, TWO, DONE = b'data: {"n": 1}\n\n', b'data: {"n": 2}\n\n', b"data: [DONE]\n\n"


def names(replicas: Scripted) -> list[str]:
    return [name for name, _ in replicas.asked]


async def ask(client: httpx.AsyncClient, path: str = "/v1/predictive", **headers: str) -> httpx.Response:
    return await client.post(path, json=ASKED, headers=headers)


async def test_a_request_and_its_answer_pass_unchanged(client: httpx.AsyncClient, replicas: Scripted) -> None:
    replicas.scripts = {"a": [said("a", {"y": 2}, 201)]}
    reply = await client.post(
        "/v1/a%2Fb?c=%20d", content=b'{"x": 1}', headers={"Authorization": "Bearer k\u00e9y".encode(), "X-A": "1"}
    )
    assert (reply.status_code, reply.json(), reply.headers["x-posterior-replica"]) == (201, {"y": 2}, "a")
    assert reply.headers["x-request-id"] == "r1" and reply.headers["content-length"] == str(len(reply.content))
    [(_, request)] = replicas.asked
    passed = dict(request.headers)
    assert (request.method, request.target, request.body) == ("POST", "/v1/a%2Fb?c=%20d", b'{"x": 1}')
    assert passed["authorization"] == "Bearer k\u00e9y" and passed["x-a"] == "1"
    assert not front.OWN & {*passed} and not {"date", "connection"} & {*reply.headers}


async def test_an_error_of_a_replica_is_the_clients(client: httpx.AsyncClient, replicas: Scripted) -> None:
    for status in (400, 401, 404, 409, 429, 500):
        replicas.scripts = both(said("a", {"error": status}, status), said("b", {}))
        assert (await ask(client)).status_code == status
    assert len(replicas.asked) == 6


@pytest.mark.parametrize("sent", [0, 1, 2], ids=["nothing", "the head", "half of the body"])
async def test_a_lost_answer_is_given_by_another_replica(
    client: httpx.AsyncClient, replicas: Scripted, sent: int
) -> None:
    replicas.scripts = both([*said("a", ASKED)[:sent], lost("a")], said("b", {"y": 2}))
    reply = await ask(client, **{"X-Request-Id": "mine", "Authorization": "Bearer key"})
    assert (reply.status_code, reply.json()) == (200, {"y": 2})
    (_, first), (_, second) = replicas.asked
    assert len({*names(replicas)}) == 2 or sent == 0
    assert (first.method, first.target, first.body) == (second.method, second.target, second.body)
    assert ("authorization", "Bearer key") in second.headers
    assert ("x-request-id", "mine") in first.headers and "x-request-id" not in dict(second.headers)
    assert replicas.avoided == [frozenset(), frozenset({"a"})] and replicas.closed == 2


async def test_a_replica_that_was_lost_without_a_name_may_be_asked_again(
    client: httpx.AsyncClient, replicas: Scripted
) -> None:
    replicas.scripts = {"a": [[lost()], said("a", {"y": 2})]}
    assert (await ask(client)).json() == {"y": 2}


async def test_when_all_are_lost_the_client_gets_503(client: httpx.AsyncClient, replicas: Scripted) -> None:
    replicas.scripts = both([lost("a")], [lost("b")])
    reply = await ask(client)
    assert reply.status_code == 503 and reply.headers["retry-after"] == "5"
    assert reply.json()["error"]["code"] == "unavailable" and len(replicas.asked) == front.ATTEMPTS


async def test_a_503_of_one_replica_is_asked_of_another(client: httpx.AsyncClient, replicas: Scripted) -> None:
    busy = {"error": {"message": "loading"}}
    first, second = both((), ())
    replicas.scripts = {first: [said(first, busy, 503)], second: [said(second, {"y": 2})]}
    assert (await ask(client)).json() == {"y": 2} and names(replicas) == [first, second]
    replicas.scripts[second] = [said(second, busy, 503)]
    reply = await ask(client)
    assert (reply.status_code, reply.json()) == (503, busy)


async def test_too_many_waiting_requests_get_429(client: httpx.AsyncClient, replicas: Scripted) -> None:
    replicas.scripts = {"a": [[Busy()]]}
    reply = await ask(client)
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
    assert reply.json()["error"]["type"] == "rate_limit_error" and len(replicas.asked) == 1


async def test_a_fault_of_ours_says_nothing_of_what_is_inside(client: httpx.AsyncClient, replicas: Scripted) -> None:
    replicas.scripts = {"a": [[KeyError("secret")]]}
    reply = await ask(client)
    assert reply.status_code == 500 and "secret" not in reply.text
    assert reply.json()["error"]["code"] == "internal_error"


async def test_a_stream_passes_as_it_is(client: httpx.AsyncClient, replicas: Scripted) -> None:
    replicas.scripts = {"a": [streamed("a", ONE[:4], ONE[4:] + TWO[:-1], TWO[-1:], DONE)]}
    reply = await ask(client)
    assert reply.content == ONE + TWO + DONE and "content-length" not in reply.headers
    assert (reply.headers["content-type"], reply.headers["cache-control"]) == (EVENTS[0][1], "no-cache")
    assert replicas.closed == 1


@pytest.mark.parametrize("sent", [(), (ONE[:-1],)], ids=["the head", "half of an event"])
async def test_a_stream_without_a_whole_event_begins_on_another_replica(
    client: httpx.AsyncClient, replicas: Scripted, sent: tuple[bytes, ...]
) -> None:
    replicas.scripts = both([*streamed("a", *sent), lost("a")], streamed("b", TWO, DONE))
    assert (await ask(client)).content == TWO + DONE


async def test_a_stream_that_has_begun_ends_with_an_error_and_is_not_asked_again(
    client: httpx.AsyncClient, replicas: Scripted
) -> None:
    replicas.scripts = both([*streamed("a", ONE, TWO[:-1]), lost("a")], streamed("b", TWO, DONE))
    first, *rest = (await ask(client)).content.split(b"\n\n")
    assert first + b"\n\n" == ONE and rest[1:] == [b""], "no half of an event, and no end as of a whole stream"
    error = json.loads(rest[0].removeprefix(b"data: "))["error"]
    assert error == {
        "message": "the replica that wrote this was lost; ask again", "type": "server_error", "param": None,
        "code": "unavailable",
    }  # fmt: skip
    assert len(replicas.asked) == 1 and replicas.closed == 1


async def test_openais_client_raises_the_error_of_a_broken_stream(
    client: httpx.AsyncClient, replicas: Scripted
) -> None:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}
    replicas.scripts = {"a": [[*streamed("a", b"data: %s\n\n" % json.dumps(chunk).encode()), lost("a")]]}
    response = await ask(client)
    transport = httpx.MockTransport(lambda _: httpx.Response(200, headers=response.headers, content=response.content))
    sdk = openai.OpenAI(api_key="k", base_url="http://front/v1", http_client=httpx.Client(transport=transport))
    stream = sdk.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}], stream=True)
    with pytest.raises(openai.APIError, match="lost; ask again"):
        list(stream)


class Endless(Scripted):
    """A stream without an end."""

    async def send(self, request: Forwarded, key: str, avoided: Collection[str]) -> AsyncGenerator[Head | bytes]:
        try:
            yield Head("a", 200, EVENTS)
            while True:
                yield ONE
                await asyncio.sleep(0.001)
        finally:
            self.closed += 1


async def test_a_client_that_leaves_ends_the_work_of_the_replica() -> None:
    replicas, events = Endless(), asyncio.Event()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}

    async def receive() -> dict[str, Any]:
        if not events.is_set():
            events.set()
            return {"type": "http.request", "body": b"{}"}
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    await asyncio.wait_for(front.create_front(replicas)(scope, receive, send), 5)
    assert replicas.closed == 1


async def test_a_large_body_is_refused_before_a_replica_sees_it(client: httpx.AsyncClient, replicas: Scripted) -> None:
    assert front.MAX_BODY_BYTES == schemas.MAX_BODY_BYTES
    replicas.scripts = {"a": [said("a", {})]}
    assert (await client.post("/v1/predictive", content=b" " * front.MAX_BODY_BYTES)).status_code == 200
    reply = await client.post("/v1/predictive", content=b" " * (front.MAX_BODY_BYTES + 1))
    assert reply.status_code == 413 and reply.json()["error"]["code"] == "body_too_large"
    assert len(replicas.asked) == 1


async def test_what_changes_one_replica_alone_is_refused(client: httpx.AsyncClient, replicas: Scripted) -> None:
    replicas.scripts = {"a": [said("a", {})]}
    for method, path in (("PUT", "/v1/aliases/mood"), ("POST", "/v1/posteriors"), ("DELETE", "/v1/posteriors/mood")):
        reply = await client.request(method, path)
        assert reply.status_code == 409 and "serve deploy" in reply.json()["error"]["message"]
    assert replicas.asked == []
    assert (await client.get("/v1/posteriors")).status_code == 200


async def test_metrics_are_those_of_all_replicas(client: httpx.AsyncClient, replicas: Scripted) -> None:
    page: list[Any] = [Head("a", 200, ()), b"# TYPE n counter\nn 1.0\n"]
    replicas.scripts = {"a": [page], "b": [[Head("b", 200, ()), b"# TYPE n counter\nn 2.0\n"]], "gone": [[lost()]]}
    reply = await client.get("/metrics", headers={"Authorization": "Bearer admin"})
    assert reply.text == '# TYPE n counter\nn{replica="a"} 1.0\nn{replica="b"} 2.0\n'
    assert all(("authorization", "Bearer admin") in request.headers for _, request in replicas.asked)
    replicas.scripts["b"] = [said("b", {"error": "key"}, 401)]
    assert (await client.get("/metrics")).status_code == 401
    replicas.late = True
    assert (await client.get("/metrics")).status_code == 503


async def test_the_same_prompt_goes_to_the_same_replica() -> None:
    """Through the front's own reading of bodies: chats that begin alike, of one posterior."""
    replicas = Scripted({name: [said(name, {})] for name in "abcdefgh"})
    transport = httpx.ASGITransport(front.create_front(replicas))
    chats = [[{"role": "system", "content": f"{topic} " * 200}, {"role": "user", "content": "?"}] for topic in "xyz"]
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        for _ in range(2):
            for chat in chats:
                for question in ("one", "two"):
                    chat[1]["content"] = question
                    await client.post("/v1/chat/completions", json={"model": "mood", "messages": chat})
    by_topic = [names(replicas)[start : start + 2] for start in range(0, 12, 2)]
    assert all(len({*pair}) == 1 for pair in by_topic) and by_topic[:3] == by_topic[3:]
