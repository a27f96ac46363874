"""A real server of the shipped posteriors, for tests in a browser.

`python -m tests.web.real` prints its URL and runs until standard input ends. With `--record` it asks the server what
the page asks, writes the replies to tests/web/replies/, and ends.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from posterior.models import base as base_models
from tests.server.running import KEY, launched
from tests.web.stub import REPLIES, reply_name

SHIPPED = Path(__file__).parents[2] / "posterior/shipped"
BANK = "The machine swallowed my card, and now there are payments on my statement that I did not make."
MEAL = "The food was good, the service was slow."
DEPARTMENTS = ("account", "cards", "cash", "exchange", "payments", "security", "top-ups", "transfers")
CHOICE = {
    "type": "choice", "instructions": "Which department should answer?",
    "choices": [{"value": each} for each in DEPARTMENTS],
}  # fmt: skip
PREDICATE = {"type": "predicate", "instructions": "The customer may be a victim of fraud or theft."}
SCORE = {
    "type": "score", "instructions": "How soon does the customer need help?",
    "levels": [{"label": each} for each in ("any time", "today", "at once")],
}  # fmt: skip
COVERAGE = {"coverage": 0.9}
RISK = 0.3  # the rows of its calibration prove this error, and the example is not sure enough for it
CHAT = [{"role": "user", "content": "What is the capital of Australia?"}]
PARIS = [{"role": "user", "content": "What is the capital of France?"}]


def _asked(question: dict[str, Any], **options: Any) -> tuple[str, dict[str, Any]]:
    body = {"model": "support", "input": BANK, "questions": [question], "uncertainty": {**COVERAGE, **options}}
    return "v1/decisions", body


REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("v1/models", {}),
    ("version", {}),
    _asked(CHOICE),
    _asked(CHOICE, predictive="map"),
    _asked(CHOICE, max_risk=RISK),
    _asked(PREDICATE),
    _asked(SCORE),
    ("v1/predictive", {"model": "sentiment", "inputs": [{"text": MEAL}], **COVERAGE}),
    ("v1/chat/completions", {
        "model": "support", "messages": CHAT, "logprobs": True, "top_logprobs": 5, "max_tokens": 40, "temperature": 0.7,
        "seed": 1, "stream": True, "uncertainty": {"per_particle": True},
    }),
    ("v1/chat/completions", {
        "model": "support", "messages": PARIS, "max_tokens": 12, "seed": 1,
        "uncertainty": {"samples": 16, "meaning": "exact", "return": "meaning", "coverage": 0.9},
    }),
)  # fmt: skip


def record(url: str) -> None:
    """Writes the replies to all requests."""
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as client:
        for path, body in REQUESTS:
            response = client.post(path, json=body) if body else client.get(path)
            response.raise_for_status()
            stream = bool(body.get("stream"))
            text = response.text if stream else json.dumps(response.json(), indent=1, ensure_ascii=False) + "\n"
            (REPLIES / reply_name(path, body)).write_text(text)


def serve(root: Path) -> None:
    (root / "posteriors").symlink_to(SHIPPED)
    with launched(root, base_models.resolve(), "--particles", "8") as (url, _):
        if "--record" in sys.argv:
            record(url)
        else:
            print(url, flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        serve(Path(folder))
