"""POST /v1/predictive: posterior predictives of many inputs."""

from __future__ import annotations

import time
import uuid
from typing import Any

from server.engine import Usage
from server.http.records import answer_record, usage_record
from server.http.schemas import PredictiveRequest
from server.metrics import Observation
from server.services.keeping import Keeper
from server.services.predictive import Service
from server.validation import validated


async def reply(service: Service, body: dict[str, Any], observation: Observation) -> dict[str, Any]:
    """The answer to a request for predictives.

    Raises RequestError.
    """
    request = validated(PredictiveRequest, body)
    served = service.find(request.model)
    observation.posterior = served.owner
    question = await service.read(
        served, request, inputs=request.inputs, prompts=request.prompts, conversations=request.messages or ()
    )
    observation.predictive = question.predictive
    answers = await service.answer(question)
    usage = Usage(sum(map(len, question.prompts)), 0)
    service.metrics.count_tokens(served.owner, usage.prompt_tokens, usage.completion_tokens)
    judged = [service.judge(question, answer) for answer in answers]
    id = f"pred-{uuid.uuid4().hex}"
    Keeper(service, observation.owner, body).choices(id, judged)
    return {
        "id": id,
        "object": "predictive",
        "created": int(time.time()),
        "model": served.name,
        "posterior": served.label,
        "predictive": question.predictive,
        "particles": max(answer.predictive.particles for answer in answers),
        "data": [{"index": index, **answer_record(each)} for index, each in enumerate(judged)],
        "usage": usage_record(usage),
    }
