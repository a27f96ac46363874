"""LiteLLM in front of the real server: its proxy, configured as docs/clients.md says, and its library."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import litellm
import openai
import pytest
from posterior_client import InvalidRequestError, PosteriorClient, Prediction, ResponseError, Text, uncertainty_of

from tests.clients.asked import ANSWERS, CHAT, INPUT, KEY, QUESTIONS
from tests.clients.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # LiteLLM's are not ours


@pytest.fixture(scope="module")
def proxy(api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """LiteLLM's proxy: the address of docs/clients.md's configuration."""
    folder, port = tmp_path_factory.mktemp("litellm"), free_port()
    (folder / "litellm.yaml").write_text(configuration().replace("http://127.0.0.1:8000/v1", api))
    command = [str(Path(sys.executable).with_name("litellm")), "--config", "litellm.yaml", "--host", "127.0.0.1"]
    environment = {
        **os.environ, "POSTERIOR_API_KEY": KEY, "LITELLM_MASTER_KEY": "sk-proxy", "LITELLM_LOCAL_MODEL_COST_MAP": "True"
    }  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/health/readiness", process, folder / "log")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def configuration() -> str:
    """The page's."""
    (found,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "clients.md").read_text(), re.DOTALL)
    return str(found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.5)
    pytest.fail(f"LiteLLM did not become ready:\n{log.read_text()[-4000:]}")


@pytest.fixture
def proxied(proxy: str) -> Iterator[PosteriorClient]:
    with PosteriorClient(f"{proxy}/v1", "sk-proxy", max_retries=0) as client:
        yield client


def test_litellm_passes_decisions_through(proxied: PosteriorClient, direct: Any) -> None:
    """Its pass-through keeps `uncertainty` in the request and in the reply, and the server's words."""
    decision = proxied.openai.decisions.create(model="mood", input=INPUT, questions=QUESTIONS)
    assert [answer.model_dump() for answer in decision.answers] == direct
    found = proxied.decisions(model="mood", input=INPUT, questions=QUESTIONS[:1], uncertainty={"predictive": "map"})
    assert found.answers[0].uncertainty.predictive == "map"
    with pytest.raises(InvalidRequestError, match="no calibration tells how often such answers are wrong"):
        proxied.decisions(model="mood", input=INPUT, questions=QUESTIONS[:1], uncertainty={"max_risk": 0.05})


def test_litellm_s_own_decisions_lose_the_uncertainty(proxy: str, api: str, direct: Any) -> None:
    """In both directions: a `max_risk` is not heeded."""
    body: Any = {"model": "mood", "input": INPUT, "questions": QUESTIONS}
    with openai.OpenAI(base_url=proxy, api_key="sk-proxy", max_retries=0) as client:  # /decisions: not passed through
        decision = client.decisions.create(**body, extra_body={"uncertainty": {"max_risk": 0.05}})
    plain = [{name: value for name, value in each.items() if name != "uncertainty"} for each in direct]
    assert [answer.model_dump() for answer in decision.answers] == plain
    with pytest.raises(ResponseError, match="no `uncertainty`"):
        uncertainty_of(decision)
    own = litellm.decisions(**body | {"model": "openai/mood"}, api_base=api, api_key=KEY)
    assert [answer.model_dump() for answer in own.answers][0] == plain[0]


def test_litellm_keeps_the_uncertainty_of_a_chat(proxied: PosteriorClient, api: str) -> None:
    """Beside the message, where `uncertainty_of` finds it."""
    chat = proxied.openai.chat.completions
    [found] = uncertainty_of(chat.create(model="mood", messages=CHAT, extra_body=ANSWERS))
    assert isinstance(found, Prediction) and found.entropy.epistemic > 0
    [text] = uncertainty_of(chat.create(model="mood", messages=CHAT, max_tokens=4))
    assert isinstance(text, Text) and text.particles == 3
    reply = litellm.completion("openai/mood", CHAT, api_base=api, api_key=KEY, extra_body=ANSWERS)
    assert reply.choices[0].provider_specific_fields["uncertainty"]["confidence"] == found.confidence


def test_litellm_s_streams_lose_it(proxied: PosteriorClient) -> None:
    chunks = [*proxied.openai.chat.completions.create(model="mood", messages=CHAT, max_tokens=4, stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert not any(uncertainty_of(chunk) for chunk in chunks)


def test_an_idle_connection_stays_open(api: str) -> None:
    """Longer than uvicorn's default of 5 seconds: proxies that pool connections would now and then meet its end."""
    address = urlsplit(api)
    connection = http.client.HTTPConnection(address.hostname or "", address.port)
    local = []
    for pause in (6, 0):
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        local.append(connection.sock.getsockname() if connection.sock else None)
        time.sleep(pause)
    connection.close()
    assert local[0] == local[1] is not None
