"""Outcomes of what the real server has answered: every id that a reply names, as soon as it is there."""

from __future__ import annotations

import json
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
