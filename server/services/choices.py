"""One of the candidate answers as a chat or completion: its text, and its distribution in `uncertainty`."""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from server.engine import Usage
from server.errors import bad_request
from server.metrics import Observation
from server.schemas import ChatRequest, CompletionRequest, Kind, Uncertainty
from server.services.predictive import Answer, Question, Service, usage_record
from server.services.registry import Served

Reply = dict[str, Any] | AsyncIterator[str]

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
COLDEST = 1e-6  # below, a division may overflow, and nothing but the most probable answer is drawn anyway
HONOURED = READING | DRAWING | STREAMING | SENDING
# Of the others, the values that leave an answer as it is.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "repetition_penalty": (1.0,), "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,), "min_tokens": (0,), "top_logprobs": (0,), "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}  # fmt: skip


@dataclass(frozen=True)
class _Choice:
    text: str
    record: dict[str, Any]


async def choose(
    service: Service,
    kind: Kind,
    served: Served,
    request: ChatRequest | CompletionRequest,
    body: dict[str, Any],
    observation: Observation,
) -> Reply:
    """The answer to a request with candidate answers: a JSON object, or server-sent events. Raises ApiError."""
    options = request.uncertainty or Uncertainty()
    _check(request, options)
    n, answers = request.n or 1, options.answers or ()
    read = {name: value for name, value in body.items() if name not in DRAWING | STREAMING}
    prompts = await service.engine.render(kind, {**read, "max_tokens": 1})
    question = service.question(served, prompts, answers, options, copies=n)
    _check_length(request, question)
    observation.predictive = question.predictive
    found = await service.answer(question)
    generator, temperature = random.Random(request.seed), request.temperature or 0.0
    choices = [_draw(service, question, answer, temperature, generator) for answer in found for _ in range(n)]
    tokens = {answer: len(ids) for answer, ids in zip(question.answers, question.candidates, strict=True)}
    usage = Usage(sum(map(len, prompts)), sum(tokens[choice.text] for choice in choices))
    service.metrics.count_tokens(observation.posterior, usage)
    head = {"id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
    head["model"] = served.id
    if request.stream:
        counted = request.stream_options is not None and bool(request.stream_options.include_usage)
        return _events(kind, head, choices, usage if counted else None)
    wrap = _chat_choice if kind == "chat" else _completion_choice
    name = "chat.completion" if kind == "chat" else "text_completion"
    return {
        "object": name,
        **head,
        "choices": [wrap(i, c) for i, c in enumerate(choices)],
        "usage": usage_record(usage),
    }


def _check(request: ChatRequest | CompletionRequest, options: Uncertainty) -> None:
    """Raises ApiError 400 for a field that candidate answers cannot honour."""
    if options.mixing is not None or options.tokens is not None:
        raise bad_request("'mixing' and 'tokens' belong to text; with 'answers' leave them out", "uncertainty")
    for name in sorted(request.model_fields_set - HONOURED):
        value = getattr(request, name)
        empty = value is None or value is False or value in ([], {}, "")
        if name in type(request).model_fields and not empty and value not in NEUTRAL.get(name, ()):
            raise bad_request(
                f"{name!r} belongs to text; a choice among 'answers' cannot honour it: leave it out", name
            )


def _check_length(request: ChatRequest | CompletionRequest, question: Question) -> None:
    """Raises ApiError 400 where max_tokens would cut an answer."""
    for name in ("max_completion_tokens", "max_tokens"):
        limit = getattr(request, name, None)
        if limit is not None:
            longest = max(range(len(question.answers)), key=lambda c: len(question.candidates[c]))
            count = len(question.candidates[longest])
            if count > limit:
                answer = question.answers[longest]
                raise bad_request(f"{name} is {limit}, but the answer {answer!r} has {count} tokens", name)


def _draw(
    service: Service, question: Question, answer: Answer, temperature: float, generator: random.Random
) -> _Choice:
    """The most probable answer, or a draw from p^(1/temperature)."""
    p = answer.predictive.probability
    if temperature > 0:
        weights = ((p.log() - p.log().max()) / max(temperature, COLDEST)).softmax(0).tolist()
        chosen = generator.choices(range(len(weights)), weights)[0]
    else:
        chosen = int(p.argmax())
    return _Choice(question.answers[chosen], service.record(question, answer, chosen))


def _chat_choice(index: int, choice: _Choice) -> dict[str, Any]:
    message = {"role": "assistant", "content": choice.text}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": "stop", "uncertainty": choice.record}


def _completion_choice(index: int, choice: _Choice) -> dict[str, Any]:
    return {
        "index": index,
        "text": choice.text,
        "logprobs": None,
        "finish_reason": "stop",
        "uncertainty": choice.record,
    }


async def _events(kind: Kind, head: dict[str, Any], choices: list[_Choice], usage: Usage | None) -> AsyncIterator[str]:
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
        yield chunk(index, None, finish_reason="stop", uncertainty=choice.record)
    if usage is not None:
        yield event({**head, "choices": [], "usage": usage_record(usage)})
    yield "data: [DONE]\n\n"


def event(record: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(record, ensure_ascii=False, allow_nan=False)}\n\n"
