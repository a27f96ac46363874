"""Typed questions about one input: each becomes a choice among its options, and all are asked at once."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from posterior.calibration.records import template_hash
from posterior.calibration.risk import needed
from posterior.data import decisions
from posterior.data.decisions import Choice, Predicate, Score
from posterior.data.task import Task
from posterior.errors import PosteriorError
from server.engine import Usage
from server.errors import Refused, first
from server.metrics import Observation
from server.services.options import MAX_BACKWARD, MAX_SEQUENCES, Uncertainty
from server.services.predictive import Answer, Judged, Question, Service, predictive_name
from server.services.registry import Served

FOREIGN = ("answers", "mixing", "tokens")  # of `uncertainty`: the questions bring their options, and nothing is written


async def decide(
    service: Service,
    served: Served,
    input: Any,
    questions: Mapping[str, Predicate | Choice | Score],
    options: Uncertainty,
    observation: Observation,
    *,
    unprompted: bool = False,
) -> tuple[list[Judged], Usage]:
    """The answer to each question about the input, in order, and the tokens that it took.

    Args:
        questions: each by its name in the request.
        unprompted: every answer has its `unprompted`; that of a linearised one is theta*'s.

    Everything that can be checked is checked before the first question is sent. Raises RequestError.
    """
    for name in FOREIGN:
        if getattr(options, name) is not None:
            raise Refused(f"{name!r} has no meaning for a decision; leave it out", f"uncertainty.{name}")
    asked = await asyncio.to_thread(_ask, service, served, input, questions, options)
    observation.predictive = asked[0].predictive
    try:
        async with asyncio.TaskGroup() as group:  # one failure, or a client that has left, aborts all siblings
            tasks = [group.create_task(_answer(service, each, unprompted)) for each in asked]
    except ExceptionGroup as errors:
        raise first(errors) from errors
    judged = [service.judge(each, task.result()) for each, task in zip(asked, tasks, strict=True)]
    usage = Usage(sum(len(prompt) for each in asked for prompt in each.prompts), 0)
    service.metrics.count_tokens(served.owner, usage.prompt_tokens, usage.completion_tokens)
    return judged, usage


def within_risk(name: str, judged: Judged, allowed: float) -> Judged:
    """The answer, or its refusal where the model is less confident than the error that is allowed asks for: the larger
    part of the entropy is the reason. Raises Refused where no record can tell."""
    record, p = judged.calibration, judged.answer.predictive
    place = "uncertainty.max_risk"
    if record is None:
        raise Refused(
            f"question {name}: no calibration tells how often such answers are wrong; make one of held-out rows with "
            "`posterior calibrate`, for this predictive and dtype, or leave out 'max_risk'",
            place,
        )
    if record.risk is None:
        raise Refused(
            f"question {name}: its calibration ({record.calibrator.method}) does not tell how often answers are wrong; "
            "calibrate again with temperature, platt or isotonic",
            place,
        )
    threshold = record.risk.threshold(allowed)
    if threshold is None:
        raise Refused(
            f"question {name}: the {record.n} rows of its calibration do not prove an error of at most {allowed:g} at "
            f"any confidence (that takes at least {needed(allowed)} rows, all of them right); calibrate with more "
            "rows, or allow more",
            place,
        )
    if float(p.probability.max()) >= threshold:
        return judged
    return replace(judged, refusal="ambiguous" if p.aleatoric >= p.epistemic else "unfamiliar")


async def _answer(service: Service, question: Question, unprompted: bool) -> Answer:
    """The answer to a question of one prompt."""
    (answer,) = await service.answer(question)
    if unprompted and answer.unprompted is None:
        (point,) = await service.answer(replace(question, predictive="map"))
        return replace(answer, unprompted=point.unprompted)
    return answer


def _ask(
    service: Service,
    served: Served,
    input: Any,
    questions: Mapping[str, Predicate | Choice | Score],
    options: Uncertainty,
) -> list[Question]:
    """Each question with its own prompt and candidates. Raises Refused."""
    predictive_name(served, options)  # what is wrong with the options is no question's fault
    task = _task(service, served)
    template = template_hash(task) if served.posterior is not None and served.posterior.task == task else None
    try:
        text = decisions.transcript(input)
    except PosteriorError as error:
        raise Refused(str(error), "input") from error
    asked = []
    for name, question in questions.items():
        try:
            prompt, answers = task.ask(service.tokenizer, text, question)
            made = service.question(served, [prompt], answers, options, template=template)
            asked.append(made if template is None else replace(made, kind=question.type))
        except (PosteriorError, Refused) as error:
            raise Refused(f"question {name}: {error}", f"questions.{name}") from error
    return _within_bounds(asked, options)


def _task(service: Service, served: Served) -> Task:
    """How questions are put: as the posterior was fitted to them, or else in the default form."""
    if served.posterior is not None and served.posterior.task.kind == "decision":
        return served.posterior.task
    return Task("decision", decisions.TEMPLATE, chat=_chats(service.tokenizer), scoring=served.scoring)


def _chats(tokenizer: Any) -> bool:
    """Whether the base has a chat template."""
    try:
        return bool(tokenizer.get_chat_template())
    except ValueError:
        return False


def _within_bounds(asked: list[Question], options: Uncertainty) -> list[Question]:
    """The questions; by the mixture where the linearised predictive would be too much and was not asked for.

    Raises Refused.
    """
    backward = sum(each.backward for each in asked)
    if backward > MAX_BACKWARD:
        if options.predictive is not None:
            count = sum(len(each.candidates) for each in asked)
            raise Refused(
                f"the linearised predictive takes {count} options - {len(asked)} questions = {backward} backward "
                f"passes; the limit is {MAX_BACKWARD}: ask fewer questions at a time, or for the predictive 'mixture'",
                "uncertainty.predictive",
            )
        asked = [replace(each, predictive="mixture") for each in asked]
    evaluations = sum(each.evaluations for each in asked)
    if evaluations > MAX_SEQUENCES:
        raise Refused(
            f"these {len(asked)} questions need {evaluations} evaluations; the limit is {MAX_SEQUENCES}: ask fewer "
            "questions at a time, or for fewer 'particles'",
            "questions",
        )
    return asked
