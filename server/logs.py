"""The log: one line a record, for people or in JSON, of this server, uvicorn, vLLM and the workers alike.

The form is in the environment, where the processes of this server find it too. vLLM reads vllm-logging.json, which
names `handler` below, in each of its processes; before it does, `start` has been called (server/cli.py).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VARIABLE = "POSTERIOR_LOG_FORMAT"
VLLM_CONFIGURATION = Path(__file__).with_name("vllm-logging.json")
VLLM_LEVEL = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
ACCESS = logging.getLogger("posterior.access")  # a line for each request, with `fields`
REQUEST: ContextVar[str | None] = ContextVar("REQUEST", default=None)  # the id of the one that is being answered


class Formatter(logging.Formatter):
    """A record with its time, the id of the request that it is about, and the `fields` that it was given as extra."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields = {"request_id": REQUEST.get(), **getattr(record, "fields", {})}
        fields = {name: value for name, value in fields.items() if value is not None}
        if record.processName not in (None, "MainProcess"):
            fields["process"] = record.processName
        trace = self.formatException(record.exc_info) if record.exc_info else None
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        if self._json:
            said: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "logger": record.name}
            said |= {"message": record.getMessage().rstrip(), **fields}
            return json.dumps(said if trace is None else {**said, "exception": trace}, default=str)
        parts = [f"{time} {record.levelname} {record.name}:", record.getMessage().rstrip()]
        parts += [f"{name}={value}" for name, value in fields.items()]
        return " ".join(parts) + ("" if trace is None else f"\n{trace}")


class _Stderr(logging.StreamHandler[Any]):
    """Writes to what sys.stderr is when a record comes."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def handler() -> logging.Handler:
    """Writes records to stderr in the form that was chosen."""
    made = _Stderr()
    made.setFormatter(Formatter(_form()))
    return made


def choose(form: str) -> None:
    """From now on, lines of this process and of those that it starts have this form: "plain" or "json"."""
    os.environ[VARIABLE] = form


def start() -> None:
    """Send the records of this process to stderr: warnings, Python's own among them, and a line for each request."""
    if any(isinstance(each, _Stderr) for each in logging.getLogger().handlers):
        return
    logging.getLogger().addHandler(handler())
    logging.captureWarnings(True)
    ACCESS.setLevel(logging.INFO)
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(VLLM_CONFIGURATION))


def line(text: str, level: int = logging.INFO) -> str:
    """One of the server's own lines on its way, as `say` writes it."""
    if _form() == "plain":
        return f"posterior: {text}"
    if text.startswith("warning: "):
        text, level = text.removeprefix("warning: "), logging.WARNING
    return Formatter("json").format(logging.LogRecord("posterior", level, "", 0, text, None, None))


def _form() -> str:
    return "json" if os.environ.get(VARIABLE) == "json" else "plain"
