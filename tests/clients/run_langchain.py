"""LangChain, unchanged, against the real server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAIDecisions
from langchain_openai.decisions import Choice, Predicate, Score

from tests.clients.asked import ANSWERS, INPUT, KEY
from tests.clients.conftest import Stub, build, serving

pytestmark = pytest.mark.filterwarnings("ignore:The class `OpenAIDecisions` is in beta")
ASKED = {
    "late": Predicate(instructions="The guest had to wait."),
    "mood": Choice(instructions="How does the guest feel?", choices={"angry": None, "glad": "would come again"}),
    "soup": Score(instructions="How good was it?", levels=["bad", "fair", "good"]),
}


@pytest.fixture(scope="module")
def decisions(api: str) -> OpenAIDecisions:
    return OpenAIDecisions(model="mood", base_url=api, api_key=KEY)


def test_openai_decisions_reads_the_answers(decisions: OpenAIDecisions, direct: Any) -> None:
    found = decisions.invoke({"input": INPUT, "questions": ASKED})
    late, mood, soup = direct
    assert found.predicates["late"].probability == late["probability"]
    assert found.choices["mood"].choice == mood["choice"]
    assert found.choices["mood"].probabilities == {each["value"]: each["probability"] for each in mood["probabilities"]}
    assert found.scores["soup"].score == soup["score"]
    assert found.scores["soup"].legend == {
        0: "bad",
        1: "fair",
        2: "good",
    }
    assert found.model.startswith("mood@") and found.usage.input_tokens > 0
    assert asyncio.run(decisions.ainvoke({"input": INPUT, "questions": ASKED})) == found
    assert "uncertainty" not in found.model_dump_json()  # lost


def test_openai_decisions_takes_messages(decisions: OpenAIDecisions) -> None:
    conversation = [HumanMessage("Was it good?"), HumanMessage([{"type": "text", "text": INPUT}])]
    found = decisions.batch([{"input": state, "questions": ASKED} for state in (conversation, {"review": INPUT})])
    assert [set(each.answers) for each in found] == [set(ASKED)] * 2


def test_openai_decisions_raises_the_clients_errors(api: str) -> None:
    with pytest.raises(openai.NotFoundError, match="not served"):
        OpenAIDecisions(model="nobody", base_url=api, api_key=KEY).invoke({"input": "a", "questions": ASKED})
    with pytest.raises(openai.AuthenticationError):
        OpenAIDecisions(model="mood", base_url=api, api_key="x").invoke({"input": "a", "questions": ASKED})


def test_openai_decisions_keeps_a_refusal_and_its_uncertainty() -> None:
    """It cannot ask for `max_risk`, but a proxy can add it."""

    def add_risk(request: httpx.Request) -> httpx.Request:
        body = json.loads(request.content) | {"uncertainty": {"max_risk": 0.05}}
        headers = {name: value for name, value in request.headers.items() if name != "content-length"}
        return httpx.Request(request.method, request.url, headers=headers, json=body)

    class Adding(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            return super().handle_request(add_risk(request))

    with serving(build(Stub())) as url, httpx.Client(transport=Adding()) as client:
        found = OpenAIDecisions(model="sentiment", base_url=url, api_key="none", http_client=client).invoke(
            {"input": INPUT, "questions": ASKED}
        )
    assert set(found.refusals) == {"mood", "soup"}
    assert (found.refusals["mood"].model_extra or {})["uncertainty"]["reason"] == "unfamiliar"


def test_chat_openai_answers_from_the_posterior(api: str) -> None:
    model = ChatOpenAI(model="mood", base_url=api, api_key=KEY, extra_body=ANSWERS)
    message = model.invoke("Was the soup good?")
    assert message.content in (" no", " yes")
    assert "uncertainty" not in message.model_dump_json()  # lost
    assert asyncio.run(model.ainvoke("Was the soup good?")).content == message.content


def test_chat_openai_streams_text(api: str) -> None:
    model = ChatOpenAI(model="mood", base_url=api, api_key=KEY, max_tokens=4, temperature=0)
    chunks = [*model.stream("Was the soup good?")]
    assert "".join(str(chunk.content) for chunk in chunks) == model.invoke("Was the soup good?").content != ""
    assert not any("uncertainty" in chunk.model_dump_json() for chunk in chunks)
