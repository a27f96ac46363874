"""Outcomes of what the real server has answered: every id that a reply names, as soon as it is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.running import KEY, Running

CHAT = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 2}
PROMPTS = {"prompt": ["The food was", "The soup was"], "max_tokens": 2, "n": 2}
QUESTION = {"type": "choice", "instructions": "How?", "choices": [{"value": "glad"}, {"value": "cross"}]}
REQUESTS: list[tuple[str, dict[str, Any], int]] = [
    ("predictive", {"inputs": [{"text": "good"}, {"text": "bad"}]}, 2),
    ("decisions", {"input": "It was good.", "questions": [QUESTION]}, 1),
    ("chat/completions", CHAT, 1),
    ("chat/completions", {**CHAT, "uncertainty": {"answers": [" no", " yes"]}}, 1),
    ("chat/completions", {**CHAT, "uncertainty": {"samples": 2}}, 1),
    ("chat/completions", {**CHAT, "uncertainty": {"samples": 2, "return": "greedy"}}, 1),
    ("completions", PROMPTS, 4),
    ("completions", {**PROMPTS, "uncertainty": {"predictive": "map"}}, 4),
]


def ask(server: Running, path: str, body: dict[str, Any]) -> str:
    """The id of the reply."""
    if not body.get("stream"):
        return str(server.post(f"/v1/{path}", **body)["id"])
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", f"{server.url}/v1/{path}", json=body, headers=headers, timeout=120) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    (id,) = {json.loads(line)["id"] for line in lines}
    return str(id)


@pytest.mark.parametrize(
    ("path", "body", "answers"),
    [pytest.param(*each, id=f"{n}", marks=[pytest.mark.long] * (n > 1)) for n, each in enumerate(REQUESTS)],
)
def test_every_answer_can_get_its_outcome_at_once(
    server: Running, path: str, body: dict[str, Any], answers: int
) -> None:
    streams = (False, True) if "completions" in path else (False,)
    for stream in streams:
        id = ask(server, path, {"model": "gang", **body, **({"stream": True} if stream else {})})
        outcomes = [{"id": id, "index": index, "correct": False} for index in range(answers + 1)]
        data = server.post("/v1/outcomes", outcomes=outcomes)["data"]
        assert [each["status"] for each in data] == ["stored"] * answers + ["unknown"], (path, stream)
    assert server.metrics()["posterior_answers_dropped_total"] == 0


GIVEN = {"model": "mood", "predictive": "map", "prompts": ["The food was"], "texts": [" good."]}


def soon(check: Callable[[], bool]) -> bool:
    """Whether it comes true within some seconds."""
    deadline = time.monotonic() + 20
    while not (found := check()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def test_what_outcomes_say_of_given_texts_and_a_calibration_of_them_that_is_taken_up(server: Running) -> None:
    first = server.predict(**GIVEN)
    assert first["data"][0]["calibrated"] is False
    server.post("/v1/outcomes", id=first["id"], correct=True)
    named = {"posterior": server.mood.name, "predictive": "map", "kind": "text"}

    def told() -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {KEY}"}
        data = httpx.get(f"{server.url}/v1/outcomes/report", headers=headers).json()["data"]
        (own,) = [each for each in data if (each["predictive"], each["kind"]) == ("map", "text")
                  and each["posterior"].startswith("mood@")]  # fmt: skip
        return dict(own)

    n = told()["outcomes"]["all"]["n"]
    labels = ",".join(f'{name}="{value}"' for name, value in sorted({**named, "sample": "all"}.items()))
    series = f"posterior_rolling_outcomes{{{labels}}}"
    assert n >= 1 and soon(lambda: server.metrics().get(series) == n)
    record = next(iter(server.gang.texts.values()))
    key = record.key.model_copy(
        update={"posterior": server.mood.hash, "predictive": "map", "particles": 1, "text": "given"}
    )
    path = server.mood.add_text(record.model_copy(update={"key": key}))
    try:
        assert soon(lambda: bool(server.predict(**GIVEN)["data"][0]["calibrated"]))
    finally:
        path.unlink()
