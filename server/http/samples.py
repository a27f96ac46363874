"""Text with samples: n draws for each prompt say what it may mean, and one of them, or the greedy text, is the answer.

The samples of a prompt are one request of vLLM, drawn at temperature 1 from the mixture as it is: their weights under
the particles are right for no other distribution.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from posterior.calibration.rightness import TextKind
from server.engine import Call, Kind
from server.engine.gang import Trace
from server.errors import Refused, first
from server.http.fields import NEUTRAL, READING, SENDING, STREAMING, not_honoured
from server.http.records import Reply, attach, event, right_record, semantic_record
from server.http.schemas import ChatRequest, CompletionRequest
from server.http.streams import annotated, as_events
from server.metrics import Observation
from server.services.messages import question
from server.services.options import TextUncertainty
from server.services.semantics import Samples, Semantic, samples, semantic
from server.services.texts import Writer

ENDING = {"max_tokens", "max_completion_tokens", "stop", "stop_token_ids", "ignore_eos"}  # they only say where to stop
SHOWING = {"logprobs", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids"}  # more of the returned text
HONOURED = READING | ENDING | SHOWING | STREAMING | SENDING | {"seed", "temperature"}
GREEDY = HONOURED | {"n", "top_p", "top_k", "min_p"}  # what leaves a text at temperature 0 as it is
# Said to vLLM, since the base's folder may have other defaults.
UNCHANGED = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def check(request: ChatRequest | CompletionRequest, options: TextUncertainty) -> None:
    """Raises Refused for a field that would make the samples draws from something else, or is lost on them."""
    name = not_honoured(request, HONOURED, {**NEUTRAL, "n": (1,)})
    if name is not None:
        raise Refused(
            f"{name!r} cannot be honoured beside 'samples', which are whole texts drawn from the mixture as it is; "
            "leave it out",
            name,
        )
    greedy = options.returned == "greedy"
    if request.temperature not in (None, 0.0 if greedy else 1.0):
        raise Refused(
            f"samples are drawn at temperature 1, and the greedy text at 0; this is {request.temperature}: leave it "
            "out, and give 'return': 'greedy' if the greedy text is wanted",
            "temperature",
        )


def kind(request: ChatRequest | CompletionRequest, options: TextUncertainty) -> TextKind | None:
    """How the texts that are returned come about, where that is a way that a calibration may be of."""
    if options.samples is not None:
        return "greedy" if options.returned == "greedy" else "meaning"
    changed = not_honoured(request, GREEDY) is not None or options.mixing == "token"
    return "greedy" if request.temperature == 0 and not changed else None


@dataclass
class Asked:
    """A request with samples on its way: the trace of these, its body for vLLM, its headers, what counts it, and
    the calls that have been made for it."""

    writer: Writer
    trace: Trace
    kind: Kind
    body: dict[str, Any]
    headers: Mapping[str, str]
    observation: Observation
    calls: list[Call] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return self.writer.options.samples or 0

    async def draw(self, left_out: set[str]) -> dict[str, Any]:
        """vLLM's reply with all samples, drawn without these fields of the body."""
        body = {name: value for name, value in self.body.items() if name not in STREAMING | left_out}
        drawn: dict[str, Any] = await self._generate({**body, "n": self.samples, "temperature": 1.0}, self.trace)
        return drawn

    async def write(self) -> Any:
        """vLLM's reply or stream with the greedy text."""
        return await self._generate({**self.body, "temperature": 0.0}, self.writer.trace)

    async def _generate(self, body: dict[str, Any], trace: Trace | None) -> Any:
        engine, call = self.writer.service.engine, Call(self.headers)
        self.calls.append(call)
        return await (engine.chat if self.kind == "chat" else engine.complete)({**body, **UNCHANGED}, call, trace)

    def each(self, drawn: dict[str, Any]) -> list[Samples]:
        """The samples of each prompt."""
        n = self.samples
        choices = sorted(drawn["choices"], key=lambda choice: int(choice["index"]))
        parts = [choices[start : start + n] for start in range(0, len(choices), n)]
        cut = [sum(choice["finish_reason"] == "length" for choice in part) for part in parts]
        return [
            samples(self.trace, prompt, asked, [_said(choice) for choice in part], cut[prompt])
            for prompt, (asked, part) in enumerate(zip(self._questions(), parts, strict=True))
        ]

    def _questions(self) -> list[str]:
        """What the samples of each prompt answer."""
        if self.kind == "chat":
            return [question(self.body["messages"])]
        prompt, decode = self.body["prompt"], self.writer.service.tokenizer.decode
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        each = [prompt] if one else prompt
        return [said if isinstance(said, str) else str(decode(said, skip_special_tokens=True)) for said in each]

    def count(self) -> None:
        """Counts the tokens of all calls; they have read the same prompt."""
        usages = [usage for call in self.calls if (usage := self.writer.service.engine.usage(call)) is not None]
        if usages:
            written = sum(usage.completion_tokens for usage in usages)
            self.observation.count_tokens(usages[0].prompt_tokens, written)


async def reply(asked: Asked, request: ChatRequest | CompletionRequest) -> Reply:
    """The answer with its meanings: a JSON object, or server-sent events.

    Raises RequestError.
    """
    if asked.writer.options.returned == "greedy":
        return await (_greedy_events(asked) if request.stream else _greedy(asked))
    whole = await _most_probable(asked)
    return as_events(whole, usage=request.counts_usage) if request.stream else whole


async def _most_probable(asked: Asked) -> dict[str, Any]:
    """The reply with, for each prompt, the sample that stands for the most probable meaning."""
    writer, drawn = asked.writer, await asked.draw(set())
    asked.count()
    choices = {choice["index"]: choice for choice in drawn["choices"]}
    chosen = []
    for prompt, each in enumerate(asked.each(drawn)):
        found = await semantic(writer, each)
        number = prompt * asked.samples + found.examples[0][0]
        choice = {**choices[number], "index": prompt}
        attach(choice, writer.whole(number))
        chosen.append(_meaning(choice, found, writer, number))
        writer.keep(drawn["id"], choice, number, found.found, 0)
    return drawn | {"model": writer.served.id, "choices": chosen}


async def _greedy(asked: Asked) -> dict[str, Any]:
    """The reply with the greedy text of each prompt, written beside the samples."""
    try:
        async with asyncio.TaskGroup() as group:  # one failure, or a client that has left, aborts both
            written, drawn = group.create_task(asked.write()), group.create_task(asked.draw(SHOWING))
    except ExceptionGroup as errors:
        raise first(errors) from errors
    asked.count()
    whole: dict[str, Any] = written.result()
    each = asked.each(drawn.result())
    for choice in whole["choices"]:
        index = choice["index"]
        attach(choice, asked.writer.whole(index))
        found = await semantic(asked.writer, each[index], _said(choice))
        asked.writer.keep(whole["id"], _meaning(choice, found, asked.writer, index), None, found.found, found.own)
    _add_usage(whole["usage"], drawn.result())
    return whole | {"model": asked.writer.served.id}


async def _greedy_events(asked: Asked) -> AsyncIterator[str]:
    """The stream of the greedy text. What the samples said is on each choice's last chunk, which waits for them."""
    return _with_meanings(annotated(await asked.write(), asked.writer, asked.count), asked)


async def _with_meanings(events: AsyncIterator[str], asked: Asked) -> AsyncIterator[str]:
    drawing = asyncio.ensure_future(asked.draw(SHOWING))
    drawing.add_done_callback(lambda done: done.cancelled() or done.exception())  # a stream that broke asks no more
    texts: dict[int, str] = {}
    each: list[Samples] = []
    try:
        async for line in events:
            if not line.startswith("data: {"):
                yield line
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk.get("choices", ()):  # an error has none
                index = choice["index"]
                texts[index] = texts.get(index, "") + _said(choice)
                if choice.get("finish_reason") is not None:
                    each = each or asked.each(await drawing)
                    found = await semantic(asked.writer, each[index], texts[index])
                    said = _meaning(choice, found, asked.writer, index)
                    asked.writer.keep(chunk["id"], said, None, found.found, found.own)
            if chunk.get("usage") and not chunk["choices"]:
                _add_usage(chunk["usage"], await drawing)
            yield event(chunk)
    finally:
        drawing.cancel()


def _said(choice: dict[str, Any]) -> str:
    """The text of an element of `choices`, whole or a chunk's."""
    part = choice.get("message", choice.get("delta"))
    return (choice["text"] if part is None else part.get("content")) or ""


def _meaning(choice: dict[str, Any], found: Semantic, writer: Writer, number: int) -> dict[str, Any]:
    """The choice, which is text `number` of the writer's, with what the samples said."""
    choice["uncertainty"] |= right_record(writer.right(number, found.found, found.own))
    choice["uncertainty"]["semantic"] = semantic_record(found)
    return choice


def _add_usage(usage: dict[str, Any], drawn: dict[str, Any]) -> None:
    """Adds what the samples have written."""
    for name in ("completion_tokens", "total_tokens"):
        usage[name] += drawn["usage"]["completion_tokens"]
