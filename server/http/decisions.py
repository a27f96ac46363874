"""POST /v1/decisions: typed questions about one input, as OpenAI has them."""

from __future__ import annotations

import time
import uuid
from typing import Any

from posterior.data.decisions import Choice, Predicate, Score
from server.engine import Usage
from server.http.records import decision_record
from server.http.schemas import DecisionRequest
from server.metrics import Observation
from server.services.decisions import decide, within_risk
from server.services.keeping import Keeper
from server.services.options import DecisionUncertainty
from server.services.predictive import Service
from server.services.questions import Judged
from server.validation import validated


async def reply(service: Service, body: dict[str, Any], observation: Observation) -> dict[str, Any]:
    """The answer to a request for decisions.

    Raises RequestError.
    """
    request = validated(DecisionRequest, body)
    served = service.find(request.model)
    observation.begin(served.owner, served.users.enter())
    options = request.uncertainty or DecisionUncertainty()
    questions = {str(index): question for index, question in enumerate(request.questions)}
    judged, usage = await decide(service, served, request.input, questions, options, observation, orders=options.orders)
    if options.max_risk is not None:
        judged = [within_risk(name, each, options.max_risk) for name, each in zip(questions, judged, strict=True)]
        for reason in [each.refusal for each in judged if each.refusal is not None]:
            service.metrics.abstentions.labels(served.owner, reason).inc()
    id = f"decision-{uuid.uuid4().hex}"
    Keeper(service, observation.owner, body).choices(id, judged, request.questions, options.max_risk)
    return {
        "id": id,
        "object": "decision",
        "created": int(time.time()),
        "model": served.id,
        "answers": [_answer(question, each) for question, each in zip(request.questions, judged, strict=True)],
        "usage": _usage(usage),
    }


def _answer(question: Predicate | Choice | Score, judged: Judged) -> dict[str, Any]:
    """OpenAI's answer to a question, and ours in `uncertainty`."""
    options, p = question.options, judged.probability.tolist()
    record: dict[str, Any] = {"type": question.type, "name": question.name}
    if judged.refusal is not None:
        reason = {"reason": judged.refusal}
        return {**record, "type": "refusal", "uncertainty": decision_record(judged, options) | reason}
    if isinstance(question, Predicate):
        record["probability"] = p[0]
    elif isinstance(question, Choice):
        pairs = zip(options, p, strict=True)
        record["choice"] = options[judged.best].value
        record["confidence"] = judged.confidence
        record["probabilities"] = [{"value": each.value, "probability": share} for each, share in pairs]
    else:
        rows = zip(options, p, strict=True)
        record["score"] = sum(level * share for level, share in enumerate(p))
        record["confidence"] = judged.confidence
        record["probabilities"] = [
            {"label": each.words, "value": each.value, "probability": share} for each, share in rows
        ]
    return {**record, "uncertainty": decision_record(judged, options)}


def _usage(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage` of decisions. What is written to the prefix cache is not counted."""
    total = usage.prompt_tokens + usage.completion_tokens
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": total,
    }
