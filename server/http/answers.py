"""Chat and completion requests: text by vLLM, or one of the candidate answers with its distribution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import Request

from server.engine import Call, Kind
from server.errors import Refused
from server.http import choices, samples, structured
from server.http.records import Reply, attach
from server.http.requests import engine_headers
from server.http.schemas import BODIES, ChatRequest, CompletionRequest
from server.http.streams import annotated
from server.metrics import Observation
from server.services import texts
from server.services.keeping import Keeper
from server.services.messages import check_messages
from server.services.options import TextUncertainty
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
    observation.begin(served.owner, served.users.enter())
    checked = validated(BODIES[kind], body)
    check_messages(body.get("messages"))
    keeper = Keeper(service, observation.owner, body)
    body = {name: value for name, value in body.items() if name != "uncertainty"} | {"model": served.key}
    if checked.stream_options is not None and not checked.stream:
        raise Refused("'stream_options' belong to streams; set 'stream' or leave them out", "stream_options")
    if checked.uncertainty is not None and checked.uncertainty.answers is not None:
        return await choices.reply(service, kind, served, checked, body, observation, keeper)
    return await _write(service, kind, served, checked, body, request, observation, keeper)


async def _write(
    service: Service,
    kind: Kind,
    served: Served,
    checked: ChatRequest | CompletionRequest,
    body: dict[str, Any],
    request: Request,
    observation: Observation,
    keeper: Keeper,
) -> Reply:
    """The answer in text, under the mixture of the posterior's particles, or by the MAP or the base alone."""
    writer = _writer(service, served, checked, keeper)
    observation.predictive = writer.predictive
    if writer.drawn is not None:
        return await samples.reply(
            samples.Asked(writer, writer.drawn, kind, body, engine_headers(request), observation), checked
        )
    generate = service.engine.chat if kind == "chat" else service.engine.complete
    call = Call(engine_headers(request))
    result = await generate(body, call, writer.trace)

    def count() -> None:
        usage = service.engine.usage(call)
        if usage is not None:
            observation.count_tokens(usage.prompt_tokens, usage.completion_tokens)

    if not isinstance(result, dict):
        return annotated(result, writer, count)
    count()
    for choice in result["choices"]:
        attach(choice, writer.whole(choice["index"]))
        await structured.attach_fields(choice, writer)
        writer.keep(result["id"], choice)
    return result | {"model": served.id}


def _writer(service: Service, served: Served, checked: ChatRequest | CompletionRequest, keeper: Keeper) -> texts.Writer:
    """The writer of a request for text. Raises Refused for what cannot be given together."""
    options, n = checked.uncertainty or TextUncertainty(), checked.n or 1
    form = structured.form(checked, options)
    if options.samples is not None:
        samples.check(checked, options)
        n = options.samples + (options.returned == "greedy")
        if checked.stream and options.tokens is None:
            options = options.model_copy(update={"tokens": True})
    longest = min(checked.longest or service.engine.max_model_len, service.engine.max_model_len)
    kind = samples.kind(checked, options)
    wanted = texts.Wanted(checked.prompts, n, explicit=bool(checked.limits), longest=longest, kind=kind, form=form)
    return replace(texts.writer(service, served, options, wanted), keeper=keeper)
