"""POST /v1/systemone: typed questions about one input, as vLLM has them."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from posterior.data.decisions import QUESTION, Choice, Predicate, Score, read
from posterior.errors import PosteriorError
from server.errors import Refused
from server.http.records import decision_record
from server.http.schemas import SystemOneChoice, SystemOneNoul, SystemOneRequest, SystemOneScore
from server.metrics import Observation
from server.services.decisions import decide
from server.services.keeping import Keeper
from server.services.options import Uncertainty
from server.services.predictive import Service
from server.services.questions import Judged
from server.validation import validated

MEDIA = ("images", "audio", "videos")
UNSERVED = ("chat_template_kwargs", "cache_salt", "priority")  # of vLLM's fields, those that would change an answer


async def reply(service: Service, body: dict[str, Any], observation: Observation) -> dict[str, Any]:
    """The answer to vLLM's request for decisions.

    Raises RequestError.
    """
    request = validated(SystemOneRequest, body)
    served = service.find(service.base.id if request.model is None else request.model)
    observation.begin(served.owner, served.users.enter())
    for name in (*MEDIA, *UNSERVED):
        if getattr(request, name):
            way_out = "; describe them in 'state'" if name in MEDIA else ""
            raise Refused(f"the field {name!r} is not served here{way_out}", name)
    questions = {name: _question(name, each) for name, each in request.questions.items()}
    text = "\n\n".join(filter(None, (request.instructions, _text(request.state))))
    options = request.uncertainty or Uncertainty()
    judged, usage = await decide(service, served, text, questions, options, observation, unprompted=True)
    answers, diagnostics = {}, {}
    for (name, question), each in zip(questions.items(), judged, strict=True):
        free = each.answer.unprompted
        if free is None:
            raise RuntimeError(f"nothing is known of what {served.name} would write")
        answers[name] = _answer(question, each, free.mass)
        diagnostics[name] = {"label_mass": free.mass, "argmax_is_label": free.likeliest}
    id = f"decision-{request.request_id or uuid.uuid4().hex}"
    Keeper(service, observation.owner, body).choices(id, judged, list(questions.values()))
    return {
        "id": id,
        "object": "structured_decision",
        "created": int(time.time()),
        "model": served.id,
        "answers": answers,
        "usage": {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens},
        "diagnostics": diagnostics,
    }


def _question(name: str, asked: SystemOneChoice | SystemOneNoul | SystemOneScore) -> Predicate | Choice | Score:
    """The same question in OpenAI's form. Raises Refused."""
    form: dict[str, Any] = {"instructions": _text(asked.instructions)}
    if isinstance(asked, SystemOneChoice):
        choices = [{"value": value, "description": _text(said) or None} for value, said in asked.criteria.items()]
        form |= {"type": "choice", "choices": choices}
    elif isinstance(asked, SystemOneScore):
        form |= {"type": "score", "levels": [{"label": _text(level)} for level in asked.criteria]}
    else:
        given = () if asked.criteria is None else (("yes", asked.criteria.true), ("no", asked.criteria.false))
        meanings = [f"{word}: {_text(said)}" for word, said in given if said is not None]
        form |= {"type": "predicate", "instructions": "\n".join([form["instructions"], *meanings])}
    try:
        return read(QUESTION, form, f"question {name}")
    except PosteriorError as error:
        raise Refused(str(error), f"questions.{name}") from error


def _text(value: Any) -> str:
    """A text as it is, nothing as an empty one, and all else as compact JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _answer(question: Predicate | Choice | Score, judged: Judged, mass: float) -> dict[str, Any]:
    """vLLM's answer to a question, and ours in `uncertainty`. Its `confidence` is over the whole vocabulary."""
    p = judged.probability.tolist()
    if isinstance(question, Predicate):
        record: dict[str, Any] = {"type": "noul", "noul": p[0]}
        names = [option.words for option in question.options]
    elif isinstance(question, Choice):
        names = [option.words for option in question.options]
        record = {"type": "choice", "choice": names[judged.best]}
    else:
        names = [str(option.value) for option in question.options]
        legend = {name: option.words for name, option in zip(names, question.options, strict=True)}
        record = {"type": "score", "score": sum(level * share for level, share in enumerate(p)), "legend": legend}
    return {
        **record,
        "probabilities": dict(zip(names, p, strict=True)),
        "confidence": judged.confidence * mass,
        "uncertainty": decision_record(judged, question.options),
    }
