"""The base itself tells whether answers mean the same: it is asked, through the engine and without an adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from posterior.data import tokens
from server.errors import PromptRefused, Refused
from server.services.options import Uncertainty
from server.services.predictive import Service

ANSWERS = (" yes", " no")


async def same(service: Service, question: str, text: str, others: Sequence[str]) -> list[bool]:
    """As posterior.meaning.Comparison: the base finds " yes" more probable than " no". All comparisons are one batch of
    the engine. Raises Refused where a comparison is longer than the base reads."""
    written = [asked(question, text, other) for other in others]
    prompts = await asyncio.to_thread(lambda: [tokens.prompt(service.tokenizer, each) for each in written])
    try:
        wanted = service.question(service.find(service.base.id), prompts, ANSWERS, Uncertainty())
    except PromptRefused as error:
        raise Refused(
            f"the prompt with two of its samples, which the base is to compare, {error.said}: give a shorter prompt or "
            "a smaller 'max_tokens', or tell meanings apart in another way",
            "uncertainty.meaning",
        ) from error
    answers = await service.answer(wanted)
    return [bool(answer.predictive.probability[0] > answer.predictive.probability[1]) for answer in answers]


def asked(question: str, text: str, other: str) -> str:
    """What the base is asked."""
    return (
        f"Question: {question}\nFirst answer: {text}\nSecond answer: {other}\n"
        "Do both answers to the question mean the same, yes or no?\nAnswer:"
    )
