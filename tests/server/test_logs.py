"""One form of lines, whoever writes them: this server, uvicorn, vLLM in each of its processes, Python's warnings."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server import logs

PROGRAM = """
import logging, sys, warnings
from server import logs
from server.console import say

logs.choose(sys.argv[1])
logs.start()
logs.start()
import logging.config, json, os
logging.config.dictConfig(json.load(open(os.environ["VLLM_LOGGING_CONFIG_PATH"])))  # as vLLM does
say("ours"), say("warning: odd\\nand so on")
token = logs.REQUEST.set("r-1")
logs.ACCESS.info("request", extra={"fields": {"status": 200, "key": None}})
logs.REQUEST.reset(token)
logging.getLogger("vllm.engine").warning("from %s", "vLLM"), logging.getLogger("vllm.engine").info("not shown")
logging.getLogger("uvicorn.error").warning("from uvicorn"), logging.getLogger("anything").info("not shown")
warnings.warn("from Python")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("posterior.server").exception("request failed")
"""


def run(form: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, form],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={name: value for name, value in os.environ.items() if name not in ("VLLM_LOGGING_LEVEL", logs.VARIABLE)}
        | environment,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_is_an_object_a_line() -> None:
    found: list[dict[str, Any]] = [json.loads(line) for line in run("json")]
    said = [(each["logger"], each["level"], each["message"].splitlines()[0]) for each in found]
    assert said[:5] == [
        ("posterior", "info", "ours"),
        ("posterior", "warning", "odd"),
        ("posterior.access", "info", "request"),
        ("vllm.engine", "warning", "from vLLM"),
        ("uvicorn.error", "warning", "from uvicorn"),
    ]
    warned, failed = found[5:]
    assert warned["logger"] == "py.warnings" and "from Python" in warned["message"]
    assert failed["level"] == "error" and "ZeroDivisionError" in failed["exception"]
    access = found[2]
    assert access.pop("time").endswith("+00:00")
    assert access == {
        "level": "info",
        "logger": "posterior.access",
        "message": "request",
        "request_id": "r-1",
        "status": 200,
    }


def test_plain_lines_are_for_people() -> None:
    lines = run("plain")
    assert lines[:3] == ["posterior: ours", "posterior: warning: odd", "and so on"]
    assert lines[3].endswith(" INFO posterior.access: request request_id=r-1 status=200")
    assert lines[4].endswith(" WARNING vllm.engine: from vLLM") and "ZeroDivisionError" in lines[-1]


CHILD = """
import logging, multiprocessing

from server import cli, logs


def work():
    logging.getLogger("vllm.x").warning("from a child")


if __name__ == "__main__":
    logs.choose("json")
    child = multiprocessing.get_context("spawn").Process(target=work, name="EngineCore")
    child.start(), child.join()
"""


def test_processes_that_the_command_starts_have_the_form_from_their_first_line(tmp_path: Path) -> None:
    (tmp_path / "posterior").write_text(CHILD)  # imports the command, as its own script does
    command = [sys.executable, str(tmp_path / "posterior")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    said = json.loads(done.stderr)
    assert (said["message"], said["process"]) == ("from a child", "EngineCore")


def test_vllm_says_as_much_as_it_is_asked_to() -> None:
    lines = run("plain", VLLM_LOGGING_LEVEL="INFO")
    assert sum("not shown" in line for line in lines) == 1


def test_errors_of_the_command_have_the_form_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from server import cli

    monkeypatch.setenv(logs.VARIABLE, "json")
    assert cli.main(["serve", "--port", "99999"]) == 2
    said = json.loads(capsys.readouterr().err)
    assert said["level"] == "error" and said["message"].startswith("--port is 99999")


def test_a_record_of_another_process_names_it() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "a", None, None)
    record.processName = "EngineCore"
    assert json.loads(logs.Formatter("json").format(record))["process"] == "EngineCore"
