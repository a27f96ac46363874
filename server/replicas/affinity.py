"""Which replica a request goes to: the same one for the same posterior and the same beginning of the prompt, whose
prefix cache then knows it, unless that replica has too much to do.

Rendezvous hashing (Thaler and Ravishankar 1998) orders the replicas for each key; when one comes or goes, only its own
keys move. The load is bounded as in consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from typing import Any

PREFIX = 256  # characters of a prompt: chats with one system prompt share them
SLACK = 1.25  # times the mean number of requests that a replica may have
FEW = 4  # of several prompts, or messages: enough to fill the prefix
PROMPTS = ("messages", "prompt", "prompts", "inputs", "input", "state")  # where our routes have what is asked about


def affinity(body: bytes) -> str:
    """The key of a request: its posterior, and how its first prompt begins. Empty if there is none; the replica says
    what is wrong with such a body."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(fields, dict):
        return ""
    prompt = next((fields[name] for name in PROMPTS if name in fields), "")
    return f"{fields.get('model')} {_text(prompt)[:PREFIX]}"


def _text(prompt: Any) -> str:
    """How a prompt begins, or the first of several, or the messages of a chat."""
    first = prompt[:FEW] if isinstance(prompt, list) else prompt
    return first if isinstance(first, str) else json.dumps(first, ensure_ascii=False)


def order(key: str, loads: Mapping[str, int], avoided: Collection[str] = ()) -> list[str]:
    """The replicas, the one to ask first in front.

    Args:
        key: what `affinity` says of the request; for an empty one the least busy replica is first.
        loads: how many requests each replica has.
        avoided: those that have failed this request: they come last.
    """
    bound = math.ceil(SLACK * (sum(loads.values()) + 1) / max(len(loads), 1))

    def place(name: str) -> tuple[bool, bool, int, bytes]:
        load = loads[name]
        busy = load >= bound
        return name in avoided, busy, load if busy or not key else 0, _weight(key, name)

    return sorted(loads, key=place)


def _weight(key: str, name: str) -> bytes:
    return hashlib.blake2b(f"{name}\n{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
