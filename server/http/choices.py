"""One of the candidate answers as a chat or completion: its text, and its distribution in `uncertainty`."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from server.engine import Kind, Usage
from server.errors import Refused
from server.http.records import Reply, answer_record, event, usage_record
from server.http.schemas import ChatRequest, CompletionRequest
from server.metrics import Observation
from server.services.choices import Draw, choose
from server.services.options import Uncertainty
from server.services.predictive import Service
from server.services.questions import Judged
from server.services.registry import Served

# The fields that say how the prompt is read, which answer is drawn, and how it is sent.
READING = {
    "messages", "prompt", "tools", "add_special_tokens", "add_generation_prompt", "continue_final_message",
    "chat_template_kwargs", "reasoning_effort",
}  # fmt: skip
DRAWING = {"n", "temperature", "seed", "max_tokens", "max_completion_tokens"}
STREAMING = {"stream", "stream_options"}
SENDING = {
    "model", "uncertainty", "user", "parallel_tool_calls", "skip_special_tokens", "spaces_between_special_tokens",
    "include_stop_str_in_output",
}  # fmt: skip
HONOURED = READING | DRAWING | STREAMING | SENDING
# Of the others, the values that leave an answer as it is.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "repetition_penalty": (1.0,), "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,), "min_tokens": (0,), "top_logprobs": (0,), "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}  # fmt: skip


async def reply(
    service: Service,
    kind: Kind,
    served: Served,
    request: ChatRequest | CompletionRequest,
    body: dict[str, Any],
    observation: Observation,
) -> Reply:
    """The answer to a request with candidate answers: a JSON object, or server-sent events.

    Raises RequestError.
    """
    options = request.uncertainty or Uncertainty()
    _check(request, options)
    draw = Draw(request.n or 1, request.temperature or 0.0, request.seed, request.limits)
    read = {name: value for name, value in body.items() if name not in DRAWING | STREAMING}
    choices, usage = await choose(service, served, kind, read, options, draw, observation)
    head = {"id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
    head["model"] = served.id
    if request.stream:
        counted = request.stream_options is not None and bool(request.stream_options.include_usage)
        return _events(kind, head, choices, usage if counted else None)
    return {
        "object": "chat.completion" if kind == "chat" else "text_completion",
        **head,
        "choices": [_choice(kind, index, choice) for index, choice in enumerate(choices)],
        "usage": usage_record(usage),
    }


def _check(request: ChatRequest | CompletionRequest, options: Uncertainty) -> None:
    """Raises Refused for a field that candidate answers cannot honour."""
    if options.mixing is not None or options.tokens is not None:
        raise Refused("'mixing' and 'tokens' belong to text; with 'answers' leave them out", "uncertainty")
    for name in sorted(request.model_fields_set - HONOURED):
        value = getattr(request, name)
        empty = value is None or value is False or value in ([], {}, "")
        if name in type(request).model_fields and not empty and value not in NEUTRAL.get(name, ()):
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


async def _events(
    kind: Kind, head: dict[str, Any], choices: Sequence[Judged], usage: Usage | None
) -> AsyncIterator[str]:
    """The same choices as server-sent events: the text, then a last chunk with its distribution."""
    head = {"object": "chat.completion.chunk" if kind == "chat" else "text_completion", **head}

    def chunk(index: int, text: str | None, **last: Any) -> str:
        body: dict[str, Any] = (
            {"text": text or ""} if kind == "completion" else {"delta": {"content": text} if text is not None else {}}
        )
        if kind == "chat" and text is not None:
            body["delta"]["role"] = "assistant"
        choice = {"index": index, **body, "logprobs": None, "finish_reason": None, **last}
        return event({**head, "choices": [choice]})

    for index, choice in enumerate(choices):
        yield chunk(index, choice.text)
        yield chunk(index, None, finish_reason="stop", uncertainty=answer_record(choice))
    if usage is not None:
        yield event({**head, "choices": [], "usage": usage_record(usage)})
    yield "data: [DONE]\n\n"
