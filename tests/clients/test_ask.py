"""`posterior ask`, as a user runs it."""

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from posterior_client import Answer
from posterior_client._bars import Bar, Rows
from posterior_client.ask import main
from rich.console import Console
from rich.text import Text

from tests.clients.conftest import RECORD

SHOWN = """\
positive  (confidence 0.75, not calibrated)

  positive  0.750  [0.500, 0.875]
  negative  0.250  [0.125, 0.500]

entropy 0.562 nats = 0.500 aleatoric + 0.062 epistemic (11% epistemic)
sentiment@0123456789ab, linearized predictive
"""


BARS = """\
  positive  0.750  ████████████████▓▓▓▓▓▓▓▓░░░░····  [0.500, 0.875]
  negative  0.250  ████▓▓▓▓░░░░░░░░················  [0.125, 0.500]
"""


def ask(*arguments: str, url: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "POSTERIOR_BASE_URL": url, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "posterior_client.ask", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")


def on_a_terminal(*arguments: str, url: str) -> str:
    """The same with a terminal at stdout and stderr: what the terminal gets."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "POSTERIOR_BASE_URL": url}
    environment |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80", "LC_ALL": "C.UTF-8"}
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "posterior_client.ask", *arguments]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=its, stderr=its)
    os.close(its)
    got = b""
    try:
        while part := os.read(ours, 4096):
            got += part
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, got
    return got.decode().replace("\r\n", "\n")


def rendered(shown: Any, width: int = 80, encoding: str = "utf-8", **environment: str) -> str:
    """What a terminal of this width gets."""
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding) as file:
        system: Any = "auto" if environment else None
        Console(file=file, width=width, force_terminal=True, color_system=system, _environ=environment).print(shown)
        file.flush()
        return raw.getvalue().decode()


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


def test_a_pipe_gets_plain_lines(stub: Any) -> None:
    done = ask("the food was great", url=stub.url)
    assert (done.stdout, done.stderr, done.returncode) == (SHOWN, "", 0)
    # The first posterior served: neither the base nor a MAP.
    assert stub.bodies == [{"model": "sentiment", "inputs": [{"text": "the food was great"}]}]


def test_a_terminal_gets_bars_in_colour_after_a_sign_that_it_waits(stub: Any) -> None:
    got = on_a_terminal("good", url=stub.url)
    waiting, _, answer = got.partition("positive  (")
    assert f"waiting for {stub.url}" in waiting
    assert "\x1b[38;2;0;114;178m████████████████\x1b[0m" in got.replace("1;38;2", "38;2")
    assert BARS in Text.from_ansi(got).plain + "\n"


def test_no_color_leaves_the_bars() -> None:
    shown = rendered(Rows(["a"], [answer(0.75, 0.5, 0.875)]), NO_COLOR="1", FORCE_COLOR="1", COLORTERM="truecolor")
    assert "\x1b[1m" in shown and "38;2;" not in shown
    assert "▓▓▓▓▓▓▓▓░░░░" in Text.from_ansi(shown).plain


def test_a_terminal_without_utf8_gets_ascii() -> None:
    assert rendered(Bar(answer(0.75, 0.5, 0.875)), encoding="ascii") == "################========----....\n"


def test_an_answer_that_the_encoding_lacks_is_escaped(stub: Any) -> None:
    done = ask("good", "--predicate", "schön", url=stub.url, encoding="ascii")
    assert done.stdout.startswith("sch\\xf6n\n")


def test_json(stub: Any) -> None:
    (line,) = ask("good", "--json", url=stub.url).stdout.splitlines()
    shown = json.loads(line)
    assert shown["object"] == "predictive" and shown["data"] == [{"index": 0, **RECORD}]  # the reply as it is


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


def answer(probability: float, low: float, high: float) -> Answer:
    return Answer(answer="a", probability=probability, variance=0.0, std=0.0, interval=(low, high))


@pytest.mark.parametrize("width", [8, 31, 32, 80])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.3), (0.0, 0.01), (0.5, 0.6)])
def test_a_bar_fills_its_room_up_to_32_cells(interval: tuple[float, float], width: int) -> None:
    assert len(rendered(Bar(answer(0.3, *interval)), width).rstrip("\n")) == min(width, 32)


def test_rows_fit_a_narrow_terminal_and_wide_letters() -> None:
    lines = rendered(Rows(["銀行 振込", "an option of many words"], [answer(0.5, 0.25, 0.75)] * 2), 52).splitlines()
    assert all(Text(line).cell_len <= 52 for line in lines)
    first, second = (next(line for line in lines if word in line) for word in ("銀行", "an option"))
    starts = [Text(line[: line.index("0.500")]).cell_len for line in (first, second)]
    assert starts[0] == starts[1] and first.endswith("[0.250, 0.750]")


def test_without_rich_one_line_says_what_to_install(stub: Any) -> None:
    code = "import sys; sys.modules['rich'] = None; from posterior_client.ask import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "good"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "posterior: the library rich is missing; install it: pip install 'posterior-client[ask]'\n"
