"""Tool calls whose text is drawn from the mixture, by a real server with vLLM's `hermes` parser."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.server.running import KEY, Running

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Book a table.",
        "strict": True,  # the grammar holds the arguments to the schema; vLLM leaves them free otherwise
        "parameters": {
            "type": "object",
            "properties": {"meal": {"enum": ["lunch", "dinner"]}},
            "required": ["meal"],
            "additionalProperties": False,
        },
    },
}
ASKED: Any = {
    "model": "gang",
    "messages": [{"role": "user", "content": "A table for tonight, please."}],
    "tools": [TOOL],
    "max_tokens": 100,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.mark.parametrize(
    "choice", ["required", pytest.param({"type": "function", "function": {"name": "book"}}, marks=pytest.mark.long)]
)
def test_a_call_is_written_by_the_mixture(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(**ASKED, tool_choice=choice)
    calls = answer.choices[0].message.tool_calls
    assert calls, answer
    assert calls[0].function.name == "book" and json.loads(calls[0].function.arguments)["meal"] in ("lunch", "dinner")
    uncertainty = (answer.choices[0].model_extra or {})["uncertainty"]
    assert uncertainty["predictive"] == "mixture" and uncertainty["logprob"] < -1


def test_a_streamed_call_says_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED, tool_choice="required").choices[0]
    text, parts = "", []
    for chunk in client.chat.completions.create(**ASKED, tool_choice="required", stream=True):
        parts.append((chunk.choices[0].model_extra or {}).get("uncertainty"))
        text += "".join(
            call.function.arguments or "" for call in chunk.choices[0].delta.tool_calls or [] if call.function
        )
    assert whole.message.tool_calls
    assert json.loads(text) == json.loads(whole.message.tool_calls[0].function.arguments)
    said = [part for part in parts if part and "logprob" in part]
    assert len(said) == 1
    assert said[0]["logprob"] == pytest.approx((whole.model_extra or {})["uncertainty"]["logprob"], abs=1e-3)


def test_no_call_is_forced(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASKED | {"max_tokens": 8}, tool_choice="none")
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
