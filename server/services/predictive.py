"""From tokens to the posterior predictive distribution over candidate answers, and its record in JSON."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import ValidationError

from posterior.calibration.records import Dtype, Key, Record, template_hash
from posterior.data import candidates as candidate_answers
from posterior.data.candidates import Candidates
from posterior.data.chat import texts, tool_calls
from posterior.data.task import Task, Tokenizer
from posterior.errors import PosteriorError
from posterior.models.base import Base
from posterior.predictive.mixture import Predictive, from_gaussian, from_particles
from server.engine import Engine, Usage
from server.engine.scoring import prefix_tree
from server.errors import bad_request, from_validation, model_not_found
from server.metrics import Metrics, Observation
from server.schemas import MAX_NUMBERS, MAX_SEQUENCES, PredictiveName, PredictiveRequest, Uncertainty
from server.services.registry import Registry, Served
from server.workers.linearized import Linearizer


@dataclass(frozen=True)
class Question:
    """What is asked of one posterior: prompts as token ids, and the candidates that may follow them.

    template: hash of the task, where the server itself made the prompts with it and the answers are the task's own, if
    it has any.
    """

    served: Served
    predictive: PredictiveName
    prompts: list[list[int]]
    answers: tuple[str, ...]
    candidates: Candidates
    options: Uncertainty
    template: str | None = None


@dataclass(frozen=True)
class Answer:
    """The predictive of one prompt; `particles` [K, C] are each particle's probabilities, if there are any."""

    predictive: Predictive
    particles: torch.Tensor | None


class Service:
    """Everything one server process answers with."""

    def __init__(
        self, registry: Registry, engine: Engine, linearizer: Linearizer | None, tokenizer: Tokenizer, metrics: Metrics
    ) -> None:
        self.registry = registry
        self.engine = engine
        self.linearizer = linearizer
        self.tokenizer = tokenizer
        self.metrics = metrics

    @property
    def base(self) -> Base:
        return self.registry.base

    def find(self, name: object) -> Served:
        """The model of that name or id. Raises ApiError 404."""
        served = self.registry.find(name) if isinstance(name, str) else None
        if served is None:
            raise model_not_found(name)
        return served

    def question(
        self,
        served: Served,
        prompts: list[list[int]],
        answers: Sequence[str],
        options: Uncertainty,
        copies: int = 1,
        template: str | None = None,
    ) -> Question:
        """Check everything that can be checked before any work is done; each record is sent `copies` times.

        Raises ApiError 400.
        """
        try:
            candidates = candidate_answers.encode(self.tokenizer, answers)
        except PosteriorError as error:
            raise bad_request(str(error), "answers") from error
        predictive = _predictive(served, options)
        longest = max(map(len, candidates))
        for index, prompt in enumerate(prompts):
            self._check_prompt(index, prompt, longest)
        passes = len(candidates)
        if predictive != "linearized":
            passes = len(prefix_tree(candidates)) * _particles(served, predictive, options)
        _check_size(len(prompts) * passes, MAX_SEQUENCES, "evaluations")
        _check_size(len(prompts) * copies * len(candidates) ** 2, MAX_NUMBERS, "numbers in the response")
        return Question(served, predictive, prompts, tuple(answers), candidates, options, template)

    def _check_prompt(self, index: int, prompt: list[int], answer_tokens: int) -> None:
        limit = self.engine.max_model_len
        if not prompt:
            raise bad_request(f"prompt {index} is empty")
        if len(prompt) + answer_tokens > limit:
            raise bad_request(
                f"prompt {index} has {len(prompt)} tokens; with an answer of {answer_tokens} the limit is {limit}"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.engine.vocab_size:
            raise bad_request(f"prompt {index} holds a token id outside the vocabulary of {self.engine.vocab_size}")

    async def answer(self, question: Question) -> list[Answer]:
        """The predictive of each prompt, in order."""
        served, options = question.served, question.options
        if question.predictive == "linearized":
            if self.linearizer is None or served.posterior is None:
                raise RuntimeError(f"{served.name} has no linearised predictive")
            moments = await self.linearizer.moments(served.name, question.prompts, question.candidates)
            return await asyncio.to_thread(
                lambda: [Answer(from_gaussian(mean, cov, coverage=options.coverage), None) for mean, cov in moments]
            )
        if question.predictive == "map":
            adapters, weights = [served.map], torch.ones(1)
        else:
            k = _particles(served, "mixture", options)
            adapters, weights = list(served.particles[:k]), torch.tensor(served.weights[:k])
        scores = await self.engine.score(question.prompts, question.candidates, adapters)  # [prompts, K, C]
        compared, scale = served.scoring
        if compared == "mean":
            scores = scores / torch.tensor([len(tokens) for tokens in question.candidates])
        log_p = (scale * scores).log_softmax(-1)
        return [Answer(from_particles(row, weights, options.coverage), row.exp()) for row in log_p]

    def record(self, question: Question, answer: Answer, chosen: int | None = None) -> dict[str, Any]:
        """The JSON of one answer, about candidate `chosen` (None: the most probable one). In nats.

        A matching calibration gives the probabilities, and with them answer, confidence and logprob; variances,
        intervals, entropies and the Monte-Carlo error stay those of the posterior, whose own probabilities are named
        `uncalibrated`.
        """
        p = answer.predictive
        calibration = self._calibration(question, p)
        probability = p.probability if calibration is None else calibration.apply(p.probability)
        best = int(probability.argmax()) if chosen is None else chosen
        confidence = float(probability[best])
        self.metrics.count_answer(_label(question.served), question.predictive, p, confidence)
        record: dict[str, Any] = {
            "posterior": question.served.label,
            "predictive": question.predictive,
            "particles": p.particles,
            "answer": question.answers[best],
            "confidence": confidence,
            "calibrated": calibration is not None,
            "calibration": None if calibration is None else calibration.summary(),
            "logprob": math.log(max(confidence, 1e-300)),
            "answers": [
                {
                    "answer": text,
                    "probability": float(probability[c]),
                    "variance": float(p.variance[c]),
                    "std": float(p.std[c]),
                    "interval": p.interval[c].tolist(),
                }
                for c, text in enumerate(question.answers)
            ],
            "covariance": p.covariance.tolist(),
            "entropy": {"total": p.total, "aleatoric": p.aleatoric, "epistemic": p.epistemic},
            "variance": {"epistemic": float(p.variance[best]), "total": float(p.total_variance[best])},
            "effective_particles": p.effective_particles,
            "mc_error": float(p.mc_error[best]),
        }
        if calibration is not None:
            within = calibration.prediction_set(p.probability, question.options.coverage).tolist()
            record["prediction_set"] = [text for text, inside in zip(question.answers, within, strict=True) if inside]
            for item, own in zip(record["answers"], p.probability.tolist(), strict=True):
                item["uncalibrated"] = own
        if question.options.per_particle and answer.particles is not None:
            record["per_particle"] = answer.particles.tolist()
        return record

    def _calibration(self, question: Question, p: Predictive) -> Record | None:
        """The record made for exactly this base, posterior, template, predictive, number of particles and dtype, and
        for so many answers where each question brings its own."""
        posterior = question.served.posterior
        if posterior is None or question.template is None:
            return None
        key = Key(
            base=self.base.hash,
            posterior=posterior.hash,
            template=question.template,
            predictive=question.predictive,
            particles=p.particles,
            dtype=self._dtype(question.predictive),
            answers=None if posterior.task.answers else len(question.answers),
        )
        return posterior.calibration.get(key)

    def _dtype(self, predictive: PredictiveName) -> Dtype:
        """What the base's weights are where this predictive is computed."""
        if predictive == "linearized" and self.linearizer is not None:
            return self.linearizer.dtype
        return cast(Dtype, self.engine.dtype)

    def unapplied(self) -> list[str]:
        """A line for each calibration that is of another dtype than its predictive is computed in here."""
        lines = []
        for posterior in self.registry.posteriors:
            for key in posterior.calibration:
                dtype = self._dtype(key.predictive)
                if key.dtype == dtype or key.model_copy(update={"dtype": dtype}) in posterior.calibration:
                    continue
                particles = f" --particles {key.particles}" if key.predictive == "mixture" else ""
                lines.append(
                    f"the calibration of {posterior.name}'s {key.predictive} was made in {key.dtype} and is not "
                    f"applied to answers in {dtype}; run `posterior calibrate {posterior.path} ROWS "
                    f"--predictive {key.predictive}{particles} --dtype {dtype}`"
                )
        return lines

    async def predict(self, body: dict[str, Any], observation: Observation) -> dict[str, Any]:
        """POST /v1/predictive."""
        try:
            request = PredictiveRequest.model_validate(body)
        except ValidationError as error:
            raise from_validation(error, body) from error
        served = self.find(request.model)
        observation.posterior = _label(served)
        question = await self._question(served, request)
        observation.predictive = question.predictive
        answers = await self.answer(question)
        usage = Usage(sum(map(len, question.prompts)), 0)
        self.metrics.count_tokens(_label(served), usage)
        data = [{"index": i, **self.record(question, answer)} for i, answer in enumerate(answers)]
        return {
            "id": f"pred-{uuid.uuid4().hex}",
            "object": "predictive",
            "created": int(time.time()),
            "model": served.name,
            "posterior": served.label,
            "predictive": question.predictive,
            "particles": answers[0].predictive.particles,
            "data": data,
            "usage": usage_record(usage),
        }

    async def _question(self, served: Served, request: PredictiveRequest) -> Question:
        if request.mixing is not None or request.tokens is not None:
            raise bad_request("'mixing' and 'tokens' belong to text; leave them out", "mixing")
        task = None if served.posterior is None else served.posterior.task
        answers = request.answers or (task.answers if task is not None else None)
        if answers is None:
            raise bad_request(f"the model {served.name!r} has no answers of its own; give 'answers'", "answers")
        template = None
        if request.inputs is not None:
            if task is None:
                raise bad_request("the base model has no template; give 'prompts' or 'messages'", "inputs")
            prompts = await asyncio.to_thread(_rendered, task, self.tokenizer, request.inputs)
            template = template_hash(task) if task.answers in (None, tuple(answers)) else None
        else:
            prompts = await self._read(served, request)
        return self.question(served, prompts, answers, request, template=template)

    async def _read(self, served: Served, request: PredictiveRequest) -> list[list[int]]:
        """Token ids of prompts or conversations, read as completion and chat requests are."""
        model = {"model": served.name}
        if request.prompts is not None:
            return await self.engine.render("completion", {**model, "prompt": request.prompts, "max_tokens": 1})
        prompts = []
        for messages in request.messages or ():
            check_messages(messages)
            prompts += await self.engine.render("chat", {**model, "messages": messages})
        return prompts


def check_messages(messages: Any) -> None:
    """What vLLM lets pass, or says of other places than the one at fault: messages without content, media, which name
    addresses that the server would fetch, and tool calls that a fit would refuse.

    Raises ApiError 400.
    """
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        where = f"message {index}"
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or (content is None and role != "assistant"):
            raise bad_request(f"{where}: every message needs a 'role' and a 'content'", "messages")
        calls = message.get("tool_calls")
        try:
            texts(where, content)
            tool_calls(where, calls)
        except PosteriorError as error:
            raise bad_request(str(error), "messages") from error
        if not all(isinstance(call.get("id"), str) and call.get("type") == "function" for call in calls or ()):
            raise bad_request(
                f"{where}: each of the 'tool_calls' needs an 'id' and the 'type' \"function\"", "messages"
            )


def usage_record(usage: Usage) -> dict[str, int]:
    total = usage.prompt_tokens + usage.completion_tokens
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}


def _label(served: Served) -> str:
    """The label `posterior` of metrics."""
    return "none" if served.posterior is None else served.posterior.name


def _predictive(served: Served, options: Uncertainty) -> PredictiveName:
    """The predictive to use. Raises ApiError 400 for one this model cannot give, or options it does not take."""
    name = options.predictive or served.predictives[0]
    if name not in served.predictives:
        raise bad_request(
            f"the model {served.name!r} has no {name!r} predictive; it has {list(served.predictives)}", "predictive"
        )
    if name != "mixture" and options.particles is not None:
        raise bad_request(f"'particles' belongs to the predictive 'mixture'; this is {name!r}", "particles")
    if name == "mixture" and options.particles is not None and options.particles > len(served.particles):
        raise bad_request(
            f"particles is {options.particles}; this server holds {len(served.particles)} of {served.name!r}",
            "particles",
        )
    if name == "linearized" and options.per_particle:
        raise bad_request(
            "the linearised predictive has no particles; use the predictive 'mixture' for 'per_particle'",
            "per_particle",
        )
    return name


def _check_size(size: int, limit: int, what: str) -> None:
    if size > limit:
        raise bad_request(f"this request needs {size} {what}; the limit is {limit}: send fewer prompts at a time")


def _particles(served: Served, predictive: PredictiveName, options: Uncertainty) -> int:
    return 1 if predictive == "map" else options.particles or len(served.particles)


def _rendered(task: Task, tokenizer: Tokenizer, inputs: Sequence[Mapping[str, str]]) -> list[list[int]]:
    """Token ids of the posterior's own template, filled in. Raises ApiError 400."""
    prompts = []
    for index, row in enumerate(inputs):
        try:
            prompts.append(task.prompt_ids(tokenizer, row, exact=True))
        except PosteriorError as error:
            raise bad_request(f"input {index}: {error}", "inputs") from error
    return prompts
