"""What other people's clients ask the real server (run_langchain.py, run_litellm.py)."""

from __future__ import annotations

from typing import Any

KEY = "test-key"  # of tests/server/running.py, whose imports the environment of those clients lacks
INPUT = "I waited an hour for the soup, and it was cold."
QUESTIONS: list[Any] = [
    {"type": "predicate", "name": "late", "instructions": "The guest had to wait."},
    {
        "type": "choice",
        "name": "mood",
        "instructions": "How does the guest feel?",
        "choices": [{"value": "angry"}, {"value": "glad", "description": "would come again"}],
    },
    {
        "type": "score",
        "name": "soup",
        "instructions": "How good was it?",
        "levels": [{"label": label} for label in ("bad", "fair", "good")],
    },
]
CHAT: list[Any] = [{"role": "user", "content": "Was the soup good?"}]
ANSWERS = {"uncertainty": {"answers": [" no", " yes"]}}
