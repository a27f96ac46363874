"""One of the candidate answers as a chat or completion: its text, and its distribution in `uncertainty`."""

from __future__ import annotations

import time
import uuid
from typing import Any

from server.engine import Kind
from server.errors import Refused
from server.http.fields import READING, SENDING, STREAMING, not_honoured
from server.http.records import Reply, answer_record, usage_record
from server.http.schemas import ChatRequest, CompletionRequest
from server.http.streams import as_events
from server.metrics import Observation
from server.services.choices import Draw, choose
from server.services.keeping import Keeper
from server.services.options import TextUncertainty
from server.services.predictive import Service
from server.services.questions import Judged
from server.services.registry import Served

DRAWING = {"n", "temperature", "seed", "max_tokens", "max_completion_tokens"}  # which answer is drawn
HONOURED = READING | {"tools"} | DRAWING | STREAMING | SENDING
FOREIGN = {"mixing", "tokens", "samples", "returned", "meaning", "max_risk", "fields"}  # of `uncertainty`


async def reply(
    service: Service,
    kind: Kind,
    served: Served,
    request: ChatRequest | CompletionRequest,
    body: dict[str, Any],
    observation: Observation,
    keeper: Keeper,
) -> Reply:
    """The answer to a request with candidate answers: a JSON object, or server-sent events.

    Raises RequestError.
    """
    options = request.uncertainty or TextUncertainty()
    _check(request, options)
    draw = Draw(request.n or 1, request.temperature or 0.0, request.seed, request.limits)
    read = {name: value for name, value in body.items() if name not in DRAWING | STREAMING}
    choices, usage = await choose(service, served, kind, read, options, draw, observation)
    id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
    keeper.choices(id, choices)
    whole = {
        "id": id,
        "object": "chat.completion" if kind == "chat" else "text_completion",
        "created": int(time.time()),
        "model": served.id,
        "choices": [_choice(kind, index, choice) for index, choice in enumerate(choices)],
        "usage": usage_record(usage),
    }
    return as_events(whole, usage=request.counts_usage) if request.stream else whole


def _check(request: ChatRequest | CompletionRequest, options: TextUncertainty) -> None:
    """Raises Refused for a field that candidate answers cannot honour."""
    if any(getattr(options, name) is not None for name in FOREIGN):
        raise Refused(
            "'mixing', 'tokens', 'samples', 'return', 'meaning', 'max_risk' and 'fields' belong to text; with "
            "'answers' leave them out",
            "uncertainty",
        )
    name = not_honoured(request, HONOURED)
    if name is not None:
        raise Refused(f"{name!r} belongs to text; a choice among 'answers' cannot honour it: leave it out", name)


def _choice(kind: Kind, index: int, choice: Judged) -> dict[str, Any]:
    """An element of `choices`."""
    said: dict[str, Any] = (
        {"message": {"role": "assistant", "content": choice.text}} if kind == "chat" else {"text": choice.text}
    )
    return {
        "index": index,
        **said,
        "logprobs": None,
        "finish_reason": "stop",
        "uncertainty": answer_record(choice),
    }
