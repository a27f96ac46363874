"""Typed questions about one input: each becomes a choice among its options, and all are asked at once."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from posterior.calibration.records import template_hash
from posterior.data import decisions
from posterior.data.decisions import Choice, Predicate, Score
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.likelihood.directions import MOST
from posterior.predictive.mixture import from_particles
from server.engine import Usage
from server.errors import PromptRefused, Refused, first
from server.metrics import Observation
from server.services.options import MAX_BACKWARD, MAX_OPTIONS, MAX_ORDERS, MAX_SEQUENCES, Uncertainty
from server.services.predictive import Service, predictive_name
from server.services.questions import Answer, Judged, Orders, Question
from server.services.registry import Served
from server.services.risk import PLACE, threshold

STRANGE = 0.05  # of held-out rows, at most, are as strange as a question that is called unfamiliar
FOREIGN = ("answers", "mixing", "tokens")  # of `uncertainty`: the questions bring their options, and nothing is written


async def decide(
    service: Service,
    served: Served,
    input: Any,
    questions: Mapping[str, Predicate | Choice | Score],
    options: Uncertainty,
    observation: Observation,
    *,
    orders: int = 1,
    unprompted: bool = False,
) -> tuple[list[Judged], Usage]:
    """The answer to each question about the input, in order, and the tokens that it took.

    Args:
        questions: each by its name in the request.
        orders: how many orders of its options each is asked in; the answer is the average.
        unprompted: every answer has its `unprompted`; that of a linearised one is theta*'s.

    Everything that can be checked is checked before the first question is sent. Raises RequestError.
    """
    for name in FOREIGN:
        if getattr(options, name) is not None:
            raise Refused(f"{name!r} has no meaning for a decision; leave it out", f"uncertainty.{name}")
    total = sum(len(question.options) for question in questions.values())
    if total > MAX_OPTIONS:
        raise Refused(
            f"the questions have {total} options; the limit is {MAX_OPTIONS}: ask fewer at a time", "questions"
        )
    asked = await asyncio.to_thread(_ask, service, served, input, questions, options, orders)
    observation.predictive = asked[0][0].predictive
    try:
        async with asyncio.TaskGroup() as group:  # one failure, or a client that has left, aborts all siblings
            tasks = [
                group.create_task(_answer(service, name, each, unprompted))
                for name, each in zip(questions, asked, strict=True)
            ]
    except ExceptionGroup as errors:
        raise first(errors) from errors
    found = [task.result() for task in tasks]
    judged = [service.judge(each[0], answer) for each, answer in zip(asked, found, strict=True)]
    read = sum(len(prompt) for each in asked for one in each for prompt in one.prompts)
    usage = Usage(read, 0, sum(answer.cached for answer in found))
    observation.count_tokens(usage.prompt_tokens, usage.completion_tokens)
    return judged, usage


def within_risk(name: str, judged: Judged, allowed: float) -> Judged:
    """The answer, or its refusal where the model is less confident than the error that is allowed asks for. Raises
    Refused where no record can tell."""
    record, p = judged.calibration, judged.answer.predictive
    if record is None and judged.question.auto:
        raise Refused(
            f"question {name}: 'max_risk' needs a calibration, which belongs to a number of particles; give that "
            "number instead of 'auto', or leave out 'max_risk'",
            PLACE,
        )
    if record is None:
        raise Refused(
            f"question {name}: no calibration tells how often such answers are wrong; make one of held-out rows with "
            "`posterior calibrate`, for this predictive and dtype, or leave out 'max_risk'",
            PLACE,
        )
    if record.risk is None:
        raise Refused(
            f"question {name}: its calibration ({record.calibrator.method}) does not tell how often answers are wrong; "
            "calibrate again with temperature, platt or isotonic",
            PLACE,
        )
    if float(p.probability.max()) >= threshold(record.risk, allowed, f"question {name}: "):
        return judged
    return replace(judged, refusal="unfamiliar" if _unfamiliar(judged.answer) else "ambiguous")


def _unfamiliar(answer: Answer) -> bool:
    """Whether the question is stranger than all but STRANGE of held-out rows; where none tell, whether the larger part
    of the entropy is epistemic."""
    if answer.familiarity is not None:
        return answer.familiarity <= STRANGE
    return answer.predictive.epistemic > answer.predictive.aleatoric


async def _answer(service: Service, name: str, orders: list[Question], unprompted: bool) -> Answer:
    """The answer to a question of one prompt, which is asked in these orders of its options. `name`: its own."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_of_prompt(service, name, each)) for each in orders]
    found = [task.result() for task in tasks]
    answer = found[0] if len(found) == 1 else _average(found, orders[0])
    if unprompted and answer.unprompted is None:
        point = await _of_prompt(service, name, replace(orders[0], predictive="map"))
        return replace(answer, unprompted=point.unprompted)
    return answer


async def _of_prompt(service: Service, name: str, question: Question) -> Answer:
    """The answer to a question of one prompt. Raises Refused, with the question's name."""
    try:
        (answer,) = await service.answer(question)
    except PromptRefused as error:
        raise _about(name, error) from error
    return answer


def _about(name: str, error: PosteriorError | Refused) -> Refused:
    """The error as one of the question with this name: its client has sent no prompt, and knows of no number of one."""
    said = f"its prompt {error.said}" if isinstance(error, PromptRefused) else str(error)
    return Refused(f"question {name}: {said}", f"questions.{name}")


def _average(found: Sequence[Answer], question: Question) -> Answer:
    """A mixture of the particles in every order: each particle's weight is shared by its orders."""
    weights = question.weights
    each = torch.stack([answer.particles for answer in found if answer.particles is not None])  # [orders, K, C]
    predictive = from_particles(each.flatten(0, 1).log(), weights.repeat(len(found)), question.options.coverage)
    means = torch.stack([answer.predictive.probability for answer in found])
    variation = float((means - predictive.probability).abs().sum(1).max()) / 2
    return Answer(
        replace(predictive, particles=found[0].predictive.particles),
        each.mean(0),
        found[0].unprompted,
        Orders(len(found), variation),
        cached=sum(answer.cached for answer in found),
    )


def _orders(question: Predicate | Choice | Score, count: int) -> list[list[int] | None]:
    """The first order, which is the question's own, its reverse, and others at random, always the same ones; of a score
    there is only the reverse. Never one twice."""
    own = list(range(len(question.options)))
    found: list[list[int]] = [own, own[::-1]]
    generator = random.Random(0)
    most = 2 if isinstance(question, Score) else math.factorial(min(len(own), MAX_ORDERS))
    while len(found) < min(count, most):
        order = generator.sample(own, len(own))
        if order not in found:
            found.append(order)
    return [None, *found[1:count]]


def _ask(
    service: Service,
    served: Served,
    input: Any,
    questions: Mapping[str, Predicate | Choice | Score],
    options: Uncertainty,
    orders: int,
) -> list[list[Question]]:
    """Each question with its own prompt and candidates, once for each order of its options. Raises Refused."""
    if orders > 1:
        options = _averaged(served, options)
    predictive_name(served, options)  # what is wrong with the options is no question's fault
    task = _task(service, served)
    template = (
        template_hash(task) if served.posterior is not None and served.posterior.task == task and orders == 1 else None
    )
    try:
        text = decisions.transcript(input)
    except PosteriorError as error:
        raise Refused(str(error), "input") from error
    asked = []
    for name, question in questions.items():
        try:
            made = []
            for order in _orders(question, orders):
                prompt, answers = task.ask(service.tokenizer, text, question, order)
                made.append(service.question(served, [prompt], answers, options, template=template))
        except (PosteriorError, Refused) as error:
            raise _about(name, error) from error
        asked.append(made if template is None else [replace(each, kind=question.type) for each in made])
    return _within_bounds(asked, options)


def _averaged(served: Served, options: Uncertainty) -> Uncertainty:
    """The options of a question that is asked in several orders: particles are averaged, so the mixture answers where
    nothing else was asked for. No calibration is of such an average. Raises Refused."""
    if options.particles == "auto":
        raise Refused(
            "'orders' averages the same particles in every order; give a number of particles, not 'auto'",
            "uncertainty.particles",
        )
    if options.predictive == "linearized":
        raise Refused("'orders' averages particles; ask for the predictive 'mixture' or 'map'", "uncertainty.orders")
    if options.predictive is None and "mixture" in served.predictives:
        return options.model_copy(update={"predictive": "mixture"})
    return options


def _task(service: Service, served: Served) -> Task:
    """How questions are put: as the posterior was fitted to them, or else in the default form."""
    if served.posterior is not None and served.posterior.task.kind == "decision":
        return served.posterior.task
    return Task("decision", decisions.TEMPLATE, chat=service.chats, scoring=served.scoring)


def _within_bounds(asked: list[list[Question]], options: Uncertainty) -> list[list[Question]]:
    """The questions; by the mixture where the linearised predictive would be too much and was not asked for.

    Raises Refused.
    """
    each = [question for orders in asked for question in orders]
    backward = sum(question.backward for question in each)
    if backward > MAX_BACKWARD:
        if options.predictive is not None:
            raise Refused(
                f"the linearised predictive takes up to {backward} backward passes for these {len(each)} questions "
                f"(an option each but the first, {MOST} a question at most); the limit is {MAX_BACKWARD}: ask fewer "
                "questions at a time, or for the predictive 'mixture'",
                "uncertainty.predictive",
            )
        asked = [[replace(question, predictive="mixture") for question in orders] for orders in asked]
    evaluations = sum(question.evaluations for orders in asked for question in orders)
    if evaluations > MAX_SEQUENCES:
        raise Refused(
            f"the questions need {evaluations} evaluations; the limit is {MAX_SEQUENCES}: ask fewer "
            "questions at a time, or for fewer 'particles' or 'orders'",
            "questions",
        )
    return asked
