"""`posterior ask`, as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from posterior_client import Answer
from posterior_client._bars import ASCII, WIDTH, bar
from posterior_client.ask import main

SHOWN = """\
positive  (confidence 0.75, not calibrated)

  positive  0.750  ████████████████▓▓▓▓▓▓▓▓░░░░····  [0.500, 0.875]
  negative  0.250  ████▓▓▓▓░░░░░░░░················  [0.125, 0.500]

entropy 0.562 nats = 0.500 aleatoric + 0.062 epistemic (11% epistemic)
sentiment@0123456789ab, linearized predictive
"""


def ask(*arguments: str, url: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "POSTERIOR_BASE_URL": url, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "posterior_client.ask", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")


@pytest.fixture
def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The same in this process, of what ends in one line: that line."""

    def call(*arguments: str, url: str) -> str:
        monkeypatch.setenv("POSTERIOR_BASE_URL", url)
        monkeypatch.setattr(sys, "argv", ["ask", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        shown = capsys.readouterr()
        assert (caught.value.code, shown.out) == (2, "") and shown.err.count("\n") == 1
        return shown.err

    return call


def test_the_answer_is_shown_as_bars(stub: Any) -> None:
    done = ask("the food was great", url=stub.url)
    assert (done.stdout, done.stderr, done.returncode) == (SHOWN, "", 0)
    # The first posterior served: neither the base nor a MAP.
    assert stub.bodies == [{"model": "sentiment", "inputs": [{"text": "the food was great"}]}]


def test_a_terminal_without_utf8_gets_ascii(stub: Any) -> None:
    done = ask("good", url=stub.url, encoding="ascii")
    assert done.stdout == SHOWN.translate(str.maketrans("█▓░·", ASCII))


def test_json(stub: Any) -> None:
    shown = json.loads(ask("good", "--json", url=stub.url).stdout)
    assert shown["data"][0]["answers"][1]["probability"] == 0.75


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--field", "review"], "unknown field ['review']; the task has the field `text`"),
        (["--model", "other"], "no model `other` is served"),
    ],
)
def test_the_server_s_refusal_is_one_line(
    stub: Any, complaint: Callable[..., str], arguments: list[str], line: str
) -> None:
    assert complaint("good", *arguments, url=stub.url) == f"posterior: {line}\n"


def test_no_server_is_one_line() -> None:
    done = ask("good", url="http://127.0.0.1:9/v1")
    assert done.returncode == 2
    assert done.stderr == (
        "posterior: no server answers at http://127.0.0.1:9/v1: "
        "start one with `posterior serve`, or `make serve` in the project's folder\n"
    )


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "none://x", "http://:::"])
def test_a_proxy_that_cannot_be_used_is_one_line(
    proxy: str, complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    said = complaint("good", url="http://127.0.0.1:9/v1")
    assert said.startswith("posterior: a proxy in the environment cannot be used (") and "NO_PROXY" in said


@pytest.mark.parametrize("url", ["http://a..b/v1", "http://a b/v1", "http://" + "a" * 64, "http://[::1", "example.org"])
def test_what_is_no_url_is_one_line(url: str, complaint: Callable[..., str]) -> None:
    assert complaint("good", url=url).startswith("posterior: the base URL ")


@pytest.mark.parametrize("arguments", [["caf\udce9"], ["good", "--model", "\udcff"], ["good", "--field", "\udcff"]])
def test_bytes_that_are_not_utf8_are_one_line(stub: Any, arguments: list[str]) -> None:
    """A shell hands Latin-1 on as it is; Python keeps such bytes as halves of characters."""
    done = ask(*arguments, url=stub.url)
    assert (done.stdout, done.returncode, stub.bodies) == ("", 2, [])
    assert "half of a character or a byte that is not UTF-8" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.3), (0.0, 0.01), (0.5, 0.6)])
def test_a_bar_is_always_as_wide(interval: tuple[float, float]) -> None:
    answer = Answer(answer="a", probability=0.3, variance=0.0, std=0.0, interval=interval)
    assert len(bar(answer, ASCII)) == WIDTH
