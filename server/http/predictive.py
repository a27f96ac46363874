"""POST /v1/predictive: posterior predictives of many inputs."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from server.engine import Usage
from server.errors import Refused
from server.http.records import answer_record, text_record, usage_record
from server.http.schemas import PredictiveRequest
from server.metrics import Observation
from server.services import given
from server.services.keeping import Keeper
from server.services.options import PredictiveName
from server.services.predictive import Service
from server.services.registry import Served
from server.validation import validated

FIELDS = {"max_tokens": "texts"}  # that other routes call otherwise


async def reply(service: Service, body: dict[str, Any], observation: Observation) -> dict[str, Any]:
    """The answer to a request for predictives.

    Raises RequestError.
    """
    request = validated(PredictiveRequest, body)
    served = service.find(request.model)
    observation.begin(served.owner, served.users.enter())
    if request.texts is None:
        return await _choices(service, served, request, body, observation)
    try:
        return await _texts(service, served, request, request.texts, body, observation)
    except Refused as error:  # the options of a text stand in `uncertainty` elsewhere
        name = (error.param or "").removeprefix("uncertainty.")
        error.param = FIELDS.get(name, name) or None
        raise


async def _choices(
    service: Service, served: Served, request: PredictiveRequest, body: dict[str, Any], observation: Observation
) -> dict[str, Any]:
    """The answers that each prompt chooses from."""
    question = await service.read(
        served, request, inputs=request.inputs, prompts=request.prompts, conversations=request.messages or ()
    )
    observation.predictive = question.predictive
    answers = await service.answer(question)
    usage = Usage(sum(map(len, question.prompts)), 0)
    observation.count_tokens(usage.prompt_tokens, usage.completion_tokens)
    judged = [service.judge(question, answer) for answer in answers]
    particles = max(answer.predictive.particles for answer in answers)
    whole = _reply(served, question.predictive, particles, [answer_record(each) for each in judged], usage)
    Keeper(service, observation.owner, body).choices(whole["id"], judged)
    return whole


async def _texts(
    service: Service,
    served: Served,
    request: PredictiveRequest,
    texts: Sequence[str],
    body: dict[str, Any],
    observation: Observation,
) -> dict[str, Any]:
    """How probable each prompt's text is."""
    prompts = await service.prompt_ids(
        served, inputs=request.inputs, prompts=request.prompts, conversations=request.messages or ()
    )
    asked = await given.read(service, served, request, prompts, texts)
    observation.predictive = asked.predictive
    scored = await given.score(service, asked)
    usage = Usage(asked.tokens, 0)
    observation.count_tokens(usage.prompt_tokens, usage.completion_tokens)
    records = [{"text": text, **text_record(each)} for text, each in zip(texts, scored, strict=True)]
    whole = _reply(served, asked.predictive, len(asked.trace.adapters), records, usage)
    asked.keep(whole["id"], Keeper(service, observation.owner, body), whole["data"], scored)
    return whole


def _reply(
    served: Served, predictive: PredictiveName, particles: int, records: Sequence[dict[str, Any]], usage: Usage
) -> dict[str, Any]:
    """The JSON of the whole answer."""
    return {
        "id": f"pred-{uuid.uuid4().hex}",
        "object": "predictive",
        "created": int(time.time()),
        "model": served.name,
        "posterior": served.label,
        "predictive": predictive,
        "particles": particles,
        "data": [{"index": index, **record} for index, record in enumerate(records)],
        "usage": usage_record(usage),
    }
