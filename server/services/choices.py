"""One of the candidate answers in the place of a text: the most probable one, or a draw."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from server.engine import Kind, Usage
from server.errors import Refused
from server.metrics import Observation
from server.services.options import Uncertainty
from server.services.predictive import Service, within_limits
from server.services.questions import Answer, Judged, Question
from server.services.registry import Served

COLDEST = 1e-6  # below, a division may overflow, and nothing but the most probable answer is drawn anyway


@dataclass(frozen=True)
class Draw:
    """How answers are drawn: `n` for each prompt, at a temperature (0: the most probable), with a seed. `limits`: the
    most tokens that an answer may have, by the field that says so."""

    n: int = 1
    temperature: float = 0.0
    seed: int | None = None
    limits: Mapping[str, int] = field(default_factory=dict)


async def choose(
    service: Service,
    served: Served,
    kind: Kind,
    body: dict[str, Any],
    options: Uncertainty,
    draw: Draw,
    observation: Observation,
) -> tuple[list[Judged], Usage]:
    """The answers drawn for each prompt of `body`, in order, and the tokens that it took.

    Raises Refused.
    """
    prompts = await service.engine.render(kind, {**body, "max_tokens": 1})
    question = within_limits(service.question(served, prompts, options.answers or (), options), draw.n)
    _check_length(question, draw.limits)
    observation.predictive = question.predictive
    found = await service.answer(question)
    generator = random.Random(draw.seed)
    choices = [
        service.judge(question, answer, _drawn(answer, draw.temperature, generator))
        for answer in found
        for _ in range(draw.n)
    ]
    usage = Usage(sum(map(len, prompts)), sum(len(question.candidates[choice.best]) for choice in choices))
    observation.count_tokens(usage.prompt_tokens, usage.completion_tokens)
    return choices, usage


def _check_length(question: Question, limits: Mapping[str, int]) -> None:
    """Raises Refused where a limit would cut an answer."""
    longest = max(range(len(question.answers)), key=lambda c: len(question.candidates[c]))
    count = len(question.candidates[longest])
    for name, limit in limits.items():
        if count > limit:
            answer = question.answers[longest]
            raise Refused(f"{name} is {limit}, but the answer {answer!r} has {count} tokens", name)


def _drawn(answer: Answer, temperature: float, generator: random.Random) -> int:
    """The number of the most probable answer, or of a draw from p^(1/temperature)."""
    p = answer.predictive.probability
    if temperature <= 0:
        return int(p.argmax())
    weights = ((p.log() - p.log().max()) / max(temperature, COLDEST)).softmax(0).tolist()
    return generator.choices(range(len(weights)), weights)[0]
