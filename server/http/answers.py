"""Chat and completion requests: text by vLLM, or one of the candidate answers with its distribution."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request

from server.engine import Call, Kind
from server.errors import EngineLost, Refused
from server.http import choices
from server.http.errors import ApiError, as_api_error
from server.http.records import Reply, event, text_record
from server.http.schemas import BODIES, ChatRequest, CompletionRequest
from server.metrics import Observation
from server.services import texts
from server.services.messages import check_messages
from server.services.options import Uncertainty
from server.services.predictive import Service
from server.services.registry import Served
from server.validation import validated


async def reply(
    service: Service, kind: Kind, body: dict[str, Any], request: Request, observation: Observation
) -> Reply:
    """The answer to a chat or completion request: a JSON object, or server-sent events.

    Raises RequestError.
    """
    served = service.find(body.get("model"))
    observation.posterior = served.owner
    checked = validated(BODIES[kind], body)
    check_messages(body.get("messages"))
    body = {name: value for name, value in body.items() if name != "uncertainty"} | {"model": served.name}
    if checked.stream_options is not None and not checked.stream:
        raise Refused("'stream_options' belong to streams; set 'stream' or leave them out", "stream_options")
    if checked.uncertainty is not None and checked.uncertainty.answers is not None:
        return await choices.reply(service, kind, served, checked, body, observation)
    return await _write(service, kind, served, checked, body, request, observation)


async def _write(
    service: Service,
    kind: Kind,
    served: Served,
    checked: ChatRequest | CompletionRequest,
    body: dict[str, Any],
    request: Request,
    observation: Observation,
) -> Reply:
    """The answer in text, under the mixture of the posterior's particles, or by the MAP or the base alone."""
    wanted = texts.Wanted(checked.prompts, checked.n or 1, explicit=bool(checked.limits))
    writer = texts.writer(service, served, checked.uncertainty or Uncertainty(), wanted)
    observation.predictive = writer.predictive
    generate = service.engine.chat if kind == "chat" else service.engine.complete
    call = Call(request.headers)
    result = await generate(body, call, writer.trace)

    def count() -> None:
        usage = service.engine.usage(call)
        if usage is not None:
            service.metrics.count_tokens(observation.posterior, usage.prompt_tokens, usage.completion_tokens)

    if not isinstance(result, dict):
        return _annotated(result, writer, count)
    count()
    for choice in result["choices"]:
        _attach(choice, writer.whole(choice["index"]))
    return result | {"model": served.id}


def _attach(choice: dict[str, Any], written: texts.Written | None) -> None:
    if written is not None:
        choice["uncertainty"] = text_record(written)


def _broken_off(service: Service, line: str) -> ApiError:
    """vLLM's error in a stream as the error that its client gets."""
    return as_api_error(RuntimeError(line) if service.engine.alive() else EngineLost())


async def _annotated(events: AsyncIterator[str], writer: texts.Writer, count: Callable[[], None]) -> AsyncIterator[str]:
    """vLLM's server-sent events with our part on each chunk, our summary on each choice's last, our form of errors."""
    try:
        async for line in events:
            if line.startswith('data: {"error"'):
                yield event(_broken_off(writer.service, line).body())
            elif writer.annotates and line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                for choice in chunk["choices"]:
                    _attach(choice, writer.part(choice["index"], last=choice.get("finish_reason") is not None))
                yield event(chunk | {"model": writer.served.id})
            else:
                yield line
    finally:
        count()
