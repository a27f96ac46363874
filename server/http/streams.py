"""Server-sent events of chats and completions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from server.errors import EngineLost
from server.http.errors import ApiError, as_api_error
from server.http.records import attach, event
from server.http.structured import attach_fields
from server.services.predictive import Service
from server.services.texts import Writer

ENDING = ("finish_reason", "stop_reason", "uncertainty")  # of a choice: what its last chunk says


async def annotated(events: AsyncIterator[str], writer: Writer, count: Callable[[], None]) -> AsyncIterator[str]:
    """vLLM's server-sent events with our part on each chunk, our summary on each choice's last, our form of errors.
    `count` is called at their end."""
    try:
        async for line in events:
            if line.startswith('data: {"error"'):
                yield event(_broken_off(writer.service, line).body())
            elif writer.annotates and line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                for choice in chunk["choices"]:
                    last = choice.get("finish_reason") is not None
                    attach(choice, writer.part(choice["index"], last=last))
                    if last:
                        await attach_fields(choice, writer)
                    if last and writer.options.samples is None:  # whoever has the samples keeps it with them
                        writer.keep(chunk["id"], choice)
                yield event(chunk | {"model": writer.served.id})
            else:
                yield line
    finally:
        count()


def _broken_off(service: Service, line: str) -> ApiError:
    """vLLM's error in a stream as the error that its client gets."""
    return as_api_error(RuntimeError(line) if service.engine.alive() else EngineLost())


async def as_events(reply: dict[str, Any], *, usage: bool) -> AsyncIterator[str]:
    """A whole reply as server-sent events: the text of each choice, then a last chunk with its uncertainty; `usage`:
    then the reply's."""
    chat = reply["object"] == "chat.completion"
    head = {"object": "chat.completion.chunk" if chat else "text_completion"}
    head |= {name: reply[name] for name in ("id", "created", "model")}
    for choice in reply["choices"]:
        said = {"index": choice["index"], "logprobs": None}
        first = {name: value for name, value in choice.items() if name not in (*ENDING, "message")}
        if chat:
            first["delta"] = {name: value for name, value in choice["message"].items() if value not in (None, [])}
        yield event({**head, "choices": [{**first, "finish_reason": None}]})
        last = {name: choice[name] for name in ENDING if name in choice}
        yield event({**head, "choices": [{**said, **({"delta": {}} if chat else {"text": ""}), **last}]})
    if usage:
        yield event({**head, "choices": [], "usage": reply["usage"]})
    yield "data: [DONE]\n\n"
