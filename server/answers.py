"""Chat and completion requests: text by vLLM, or one of the candidate answers with its distribution."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import Request
from pydantic import ValidationError

from server import texts
from server.engine import Usage
from server.errors import as_api_error, bad_request, from_validation
from server.metrics import Observation
from server.predictive import Answer, Question, Service, usage_record
from server.registry import Served
from server.schemas import MAX_CHOICES, MAX_PROMPTS, Uncertainty

Kind = Literal["chat", "completion"]
Reply = dict[str, Any] | AsyncIterator[str]


async def reply(
    service: Service, kind: Kind, body: dict[str, Any], request: Request, observation: Observation
) -> Reply:
    """The answer to a chat or completion request: a JSON object, or server-sent events."""
    served = service.find(body.get("model"))
    observation.posterior = "none" if served.posterior is None else served.posterior.name
    options = _options(body)
    _check_messages(body.get("messages"))
    if options.answers is not None:
        return await _choose(service, kind, served, options, body, observation)
    return await _write(service, kind, served, options, body, request, observation)


def _check_messages(messages: Any) -> None:
    """What vLLM lets pass: messages without content, and media, which name addresses that the server would fetch.

    Raises ApiError 400.
    """
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if content is None and isinstance(message, dict) and message.get("role") != "assistant":
            raise bad_request("every message needs a 'role' and a 'content'", "messages")
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, dict) or part.get("type") not in ("text", "refusal"):
                raise bad_request("the 'content' of a message must be text", "messages")


def _options(body: dict[str, Any]) -> Uncertainty:
    given = body.pop("uncertainty", None)
    try:
        return Uncertainty.model_validate({} if given is None else given)
    except ValidationError as error:
        raise from_validation(error, "uncertainty") from error


# Text


async def _write(
    service: Service,
    kind: Kind,
    served: Served,
    options: Uncertainty,
    body: dict[str, Any],
    request: Request,
    observation: Observation,
) -> Reply:
    """Text under the mixture of the posterior's particles, or by the MAP or the base alone."""
    writer = texts.writer(service, served, options, body)
    observation.predictive = writer.predictive
    generate = service.engine.chat if kind == "chat" else service.engine.complete
    result = await generate(body, request, writer.trace)

    def count() -> None:
        usage = service.engine.usage(request)
        if usage is not None:
            service.metrics.count_tokens(observation.posterior, usage)

    if not isinstance(result, dict):
        return _annotated(result, writer, count)
    count()
    for choice in result["choices"]:
        _attach(choice, writer.whole(choice["index"]))
    return result


def _attach(choice: dict[str, Any], record: dict[str, Any] | None) -> None:
    if record is not None:
        choice["uncertainty"] = record


async def _annotated(events: AsyncIterator[str], writer: texts.Writer, count: Callable[[], None]) -> AsyncIterator[str]:
    """vLLM's server-sent events with our part on each chunk, our summary on each choice's last, our form of errors."""
    try:
        async for event in events:
            if event.startswith('data: {"error"'):
                yield _event(as_api_error(RuntimeError(event)).body())
            elif writer.annotates and event.startswith("data: {"):
                chunk = json.loads(event.removeprefix("data: "))
                for choice in chunk["choices"]:
                    _attach(choice, writer.part(choice["index"], last=choice.get("finish_reason") is not None))
                yield _event(chunk)
            else:
                yield event
    finally:
        count()


# One of the candidate answers


@dataclass(frozen=True)
class _Choice:
    text: str
    record: dict[str, Any]


async def _choose(
    service: Service, kind: Kind, served: Served, options: Uncertainty, body: dict[str, Any], observation: Observation
) -> Reply:
    if options.mixing is not None or options.tokens is not None:
        raise bad_request("'mixing' and 'tokens' belong to text; with 'answers' leave them out", "uncertainty")
    n = _number(body, "n", int, 1, 1, MAX_CHOICES)
    temperature = _number(body, "temperature", float, 0.0, 0.0, 100.0)
    seed = _number(body, "seed", int, None, -(2**63), 2**63 - 1)
    prompts = await asyncio.to_thread(_chat_prompts if kind == "chat" else _completion_prompts, service, body)
    question = service.question(served, prompts, options.answers or (), options, copies=n)
    observation.predictive = question.predictive
    answers = await service.answer(question)
    generator = random.Random(seed)
    choices = [_draw(service, question, answer, temperature, generator) for answer in answers for _ in range(n)]
    tokens = {answer: len(ids) for answer, ids in zip(question.answers, question.candidates, strict=True)}
    usage = Usage(sum(map(len, prompts)), sum(tokens[choice.text] for choice in choices))
    service.metrics.count_tokens(observation.posterior, usage)
    head = {"id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
    head["model"] = served.label or served.name
    if body.get("stream"):
        with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        return _events(kind, head, choices, usage if with_usage else None)
    wrap = _chat_choice if kind == "chat" else _completion_choice
    name = "chat.completion" if kind == "chat" else "text_completion"
    return {
        "object": name,
        **head,
        "choices": [wrap(i, c) for i, c in enumerate(choices)],
        "usage": usage_record(usage),
    }


def _draw(
    service: Service, question: Question, answer: Answer, temperature: float, generator: random.Random
) -> _Choice:
    """The most probable answer, or a draw from p^(1/temperature)."""
    p = answer.predictive.probability
    if temperature > 0:
        weights = (p.log() / temperature).softmax(0).tolist()
        chosen = generator.choices(range(len(weights)), weights)[0]
    else:
        chosen = int(p.argmax())
    return _Choice(question.answers[chosen], service.record(question, answer, chosen))


def _chat_prompts(service: Service, body: dict[str, Any]) -> list[list[int]]:
    return [service.conversation(body.get("messages"))]


def _completion_prompts(service: Service, body: dict[str, Any]) -> list[list[int]]:
    """A prompt is a text or token ids; a request holds one or a list of them."""
    prompt = body.get("prompt")
    single = isinstance(prompt, str) or (
        isinstance(prompt, list) and bool(prompt) and all(_is_token(item) for item in prompt)
    )
    prompts = [prompt] if single else prompt
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_PROMPTS:
        raise bad_request(
            f"'prompt' must be a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of them", "prompt"
        )
    return [_tokens(service, item) for item in prompts]


def _is_token(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _tokens(service: Service, item: Any) -> list[int]:
    if isinstance(item, str):
        return service.tokenizer.encode(item)
    if isinstance(item, list) and all(_is_token(token) for token in item):
        return item
    raise bad_request("every item of 'prompt' must be a text or a list of token ids", "prompt")


def _number(body: dict[str, Any], field: str, kind: type, default: Any, low: float, high: float) -> Any:
    """A number of the request within [low, high]. Raises ApiError 400."""
    value = body.get(field)
    if value is None:
        return default
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
        raise bad_request(
            f"{field} must be {'an integer' if kind is int else 'a number'} between {low} and {high}", field
        )
    return value


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
        return _event({**head, "choices": [choice]})

    for index, choice in enumerate(choices):
        yield chunk(index, choice.text)
        yield chunk(index, None, finish_reason="stop", uncertainty=choice.record)
    if usage is not None:
        yield _event({**head, "choices": [], "usage": usage_record(usage)})
    yield "data: [DONE]\n\n"


def _event(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record, ensure_ascii=False, allow_nan=False)}\n\n"
