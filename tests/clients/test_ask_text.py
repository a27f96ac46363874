"""`posterior ask --write`: a text whose tokens show their doubt. The stream is a real server's."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from openai.types.chat import ChatCompletionChunk
from posterior_client import ResponseError
from posterior_client._writing import LEAST, LEVELS, Doubt, legend, write
from rich.console import Console
from rich.style import Style
from rich.text import Text

from tests.clients.conftest import STREAM, Ask

QUESTION = "What is the capital of Australia?"
WRITE = (QUESTION, "--write", "--model", "support")
EVENTS: list[Any] = [json.loads(event.removeprefix("data: ")) for event in STREAM.split("\n\n")[:-2]]
CHOICES = [event["choices"][0] for event in EVENTS]
TEXT = "".join(each["delta"].get("content", "") for each in CHOICES)
TOKENS = [each["token"] for choice in CHOICES if choice["logprobs"] for each in choice["logprobs"]["content"]]
RECORDS = [token for each in CHOICES for token in each.get("uncertainty", {}).get("tokens", [])]
ABOUT = """
mean probability of a token 0.737; the text tells 0.097 nats about the weights
entropy 12.635 nats = 12.126 aleatoric + 0.509 epistemic (4% epistemic)
support@927721d87a59, mixture predictive
"""


def shown(events: Sequence[Any], doubt: Doubt = "total", **environment: str) -> str:
    """What a terminal gets."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=80, _environ=environment)
    write((ChatCompletionChunk.model_validate(event) for event in events), console, doubt)
    return file.getvalue()


def test_a_pipe_gets_the_text_and_then_what_is_said_of_it(ask: Ask, stub: Any) -> None:
    assert ask(*WRITE, "--temperature", "0", url=stub.url) == (0, f"{TEXT}\n{ABOUT}", "")
    (body,) = stub.bodies
    message = {"role": "user", "content": QUESTION}
    sent = {"model": "support", "messages": [message], "temperature": 0, "max_tokens": 256}
    assert body == {**sent, "logprobs": True, "stream": True}


def test_options_are_sent(ask: Ask, stub: Any) -> None:
    options = ("--max-tokens", "5", "--max-risk", ".1", "--predictive", "mixture")
    assert ask("-", *WRITE[1:], *options, url=stub.url, stdin=b"Who?\n")[0] == 0
    (body,) = stub.bodies
    assert (body["messages"][0]["content"], body["max_tokens"]) == ("Who?", 5)
    assert body["uncertainty"] == {"max_risk": 0.1, "predictive": "mixture"}


def test_json_is_the_stream_line_by_line(ask: Ask, stub: Any) -> None:
    status, out, said = ask(*WRITE, "--json", url=stub.url)
    assert (status, [json.loads(line) for line in out.splitlines()], said) == (0, EVENTS, "")


@pytest.mark.parametrize("doubt", LEAST)
def test_each_token_has_the_colour_of_its_doubt(doubt: Doubt) -> None:
    assert len(TOKENS) == len(RECORDS) and "".join(TOKENS[:-1]) == TEXT  # the last one ends the text
    text = Text.from_ansi(shown(EVENTS, doubt))
    start, levels = text.plain.index("\n\n") + 2, set()  # below the legend
    for token, record in zip(TOKENS[:-1], RECORDS, strict=False):
        level = len([least for least in LEAST[doubt] if record["entropy"][doubt] >= least])
        style = text.get_style_at_offset(Console(), start + len(token) - 1)
        assert text.plain[start : start + len(token)] == token
        assert style == Style.parse(LEVELS[level]) or (level == 0 and not style)
        start, levels = start + len(token), levels | {level}
    assert len(levels) > 2


def test_the_legend_names_the_doubt_and_each_range() -> None:
    line = legend("epistemic")
    assert line.plain == (
        "epistemic doubt of a token, nats: 0 to 0.01  0.01 to 0.03  0.03 to 0.1  0.1 to 0.3  0.3 and more"
    )
    assert [str(span.style) for span in line.spans if span.style] == list(LEVELS[1:])
    assert shown(EVENTS, "epistemic").count("epistemic doubt of a token") == 1


def test_no_color_keeps_the_marks() -> None:
    got = shown(EVENTS, NO_COLOR="1")
    assert "\x1b[3m" in got and "38;2" not in got and "48;2" not in got


def ending(**record: Any) -> list[Any]:
    """The stream with another record of the whole text."""
    last = {**CHOICES[-1], **record}
    return [*EVENTS[:-1], {**EVENTS[-1], "choices": [last]}]


def test_a_text_that_is_too_unsure_says_why() -> None:
    record = {**CHOICES[-1]["uncertainty"], "abstain": True, "reason": "unfamiliar", "confidence": 0.25}
    got = Text.from_ansi(shown(ending(uncertainty={**record, "calibrated": True}, finish_reason="length"))).plain
    assert "too unsure for --max-risk, unfamiliar: the posterior knows too little" in " ".join(got.split())
    assert "right with probability 0.25 (calibrated)" in got
    assert "the text was cut" in got


def test_text_without_particles_has_no_colours() -> None:
    map_text = {"posterior": "m@1", "predictive": "map", "calibrated": False}
    for record, line in (({"uncertainty": map_text}, "m@1, map predictive"), ({}, "base model: without a posterior")):
        chosen = [{"index": 0, "delta": {"content": "Hi\x1b"}, "logprobs": None, "finish_reason": "stop", **record}]
        got = shown([{**EVENTS[0], "choices": chosen}])
        assert got.startswith("Hi?\n\n") and line in got and "doubt of a token" not in got


def test_a_stream_that_breaks_off_is_one_line(ask: Ask, stub: Any) -> None:
    events = STREAM.split("\n\n")
    failure = 'data: {"error": {"message": "the engine ended", "type": "server_error", "code": null, "param": null}}'
    stub.stream = "\n\n".join([*events[:3], failure, ""])
    said = "posterior: the server broke off its answer: the engine ended\n"
    assert ask(*WRITE, url=stub.url) == (2, "The capital\n", said)
    stub.stream = "\n\n".join([*events[:3], "data: [DONE]", ""])
    assert ask(*WRITE, url=stub.url)[::2] == (2, "posterior: the text broke off before its end\n")
    with pytest.raises(ResponseError):
        shown(EVENTS[:3])


def test_nobody_reads_on(stub: Any) -> None:
    ours, its = os.pipe()
    os.close(ours)
    environment = {**os.environ, "POSTERIOR_BASE_URL": stub.url}
    command = [sys.executable, "-m", "server.cli", "ask", *WRITE]
    done = subprocess.run(command, env=environment, stdout=its, stderr=subprocess.PIPE)
    os.close(its)
    assert (done.returncode, done.stderr) == (141, b"")
