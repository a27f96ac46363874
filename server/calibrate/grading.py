"""Whether answers are right: by rule, or by what the base says."""

from __future__ import annotations

from collections.abc import Sequence

from posterior.data import candidates, chat, tokens
from posterior.meaning import grades
from server.calibrate.settings import Grading
from server.services.predictive import Service

JUDGE = (
    "Question: {question}\nCorrect answers: {accepted}\nStudent's answer: {text}\n"
    "Does the student's answer mean the same as one of the correct answers? Reply with Yes or No."
)


async def graded(service: Service, grading: Grading, question: str, text: str, accepted: Sequence[str]) -> bool:
    """Whether the text answers the question as one of the accepted answers does."""
    if grading == "match":
        return grades.match(text, accepted)
    if grading == "f1":
        return grades.f1(text, accepted) >= grades.ENOUGH
    asked = JUDGE.format(question=question, accepted="; ".join(accepted), text=text.strip())
    prompt, answers = _prompt(service, asked)
    found = await service.engine.score([prompt], candidates.encode(service.tokenizer, answers), [None])
    return bool(found.log_p[0, 0].argmax() == 0)


def described(grading: Grading) -> str:
    """What a record says of it."""
    return f"f1 >= {grades.ENOUGH:g}" if grading == "f1" else grading


def _prompt(service: Service, text: str) -> tuple[list[int], tuple[str, str]]:
    """Token ids of a question to the base, by its chat template where it has one, and yes and no as they follow it."""
    if service.chats:
        return chat.chat_ids(service.tokenizer, [{"role": "user", "content": text}], thinking=False), ("Yes", "No")
    return tokens.prompt(service.tokenizer, f"{text}\nReply:"), (" Yes", " No")
