"""Whether answers are right: by rule, or by what the base says."""

from __future__ import annotations

from collections.abc import Sequence

from posterior.meaning import grades
from server.calibrate.settings import Grading
from server.services import judge
from server.services.predictive import Service


async def graded(service: Service, grading: Grading, question: str, text: str, accepted: Sequence[str]) -> bool:
    """Whether the text answers the question as one of the accepted answers does."""
    if grading == "match":
        return grades.match(text, accepted)
    if grading == "f1":
        return grades.f1(text, accepted) >= grades.ENOUGH
    return any(await judge.same(service, question, text, accepted))


def described(grading: Grading) -> str:
    """What a record says of it."""
    return f"f1 >= {grades.ENOUGH:g}" if grading == "f1" else grading
