"""From tokens to the posterior predictive distribution over candidate answers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from posterior.calibration import records
from posterior.calibration.familiarity import Familiarity, adapter_of
from posterior.calibration.records import Key, Record, template_hash
from posterior.data import candidates as candidate_answers
from posterior.data.candidates import Candidates
from posterior.data.task import Task, Tokenizer
from posterior.errors import PosteriorError
from posterior.likelihood.states import NOTHING
from posterior.models.base import Base
from posterior.models.devices import Dtype
from posterior.predictive import sequential
from posterior.predictive.mixture import Predictive, from_gaussian, from_particles
from posterior.storage.artefact import Posterior
from server.engine import Engine, Scores
from server.errors import NotFound, PromptRefused, Refused, first
from server.metrics import Metrics
from server.services.messages import check_messages
from server.services.options import MAX_NUMBERS, MAX_SEQUENCES, PredictiveName, Uncertainty
from server.services.questions import Answer, Judged, Question, Unprompted
from server.services.registry import Registry, Served
from server.store.store import Store
from server.workers.comparer import Comparer
from server.workers.linearized import Linearizer

if TYPE_CHECKING:
    from server.services.lifecycle import Lifecycle
    from server.services.monitor import Monitor


class Service:
    """Everything one server process answers with."""

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        linearizer: Linearizer | None,
        tokenizer: Tokenizer,
        metrics: Metrics,
        comparer: Comparer | None = None,
        store: Store | None = None,
    ) -> None:
        self.registry = registry
        self.engine = engine
        self.linearizer = linearizer
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.comparer = comparer
        self.store = store
        self.monitor: Monitor | None = None
        self.lifecycle: Lifecycle | None = None

    @property
    def base(self) -> Base:
        """The base of all that is served."""
        return self.registry.base

    @property
    def chats(self) -> bool:
        """Whether the base has a chat template."""
        try:
            return bool(cast(Any, self.tokenizer).get_chat_template())
        except ValueError:
            return False

    def only(self, names: Container[str]) -> Service:
        """The same, for somebody to whom no other models are served."""
        narrow = copy.copy(self)
        narrow.registry = self.registry.only(names)
        return narrow

    def find(self, name: object) -> Served:
        """The model of that name or id. Raises NotFound."""
        served = self.registry.find(name) if isinstance(name, str) else None
        if served is None:
            raise NotFound(name)
        return served

    def question(
        self,
        served: Served,
        prompts: list[list[int]],
        answers: Sequence[str],
        options: Uncertainty,
        template: str | None = None,
    ) -> Question:
        """The question, of which everything but its size has been checked before any work is done. Raises Refused."""
        try:
            candidates = candidate_answers.encode(self.tokenizer, answers)
        except PosteriorError as error:
            raise Refused(str(error), "answers") from error
        predictive = predictive_name(served, options)
        longest = max(map(len, candidates))
        for index, prompt in enumerate(prompts):
            self.check_prompt(index, prompt, longest, self.engine.max_model_len)
        return Question(served, predictive, prompts, tuple(answers), candidates, options, template)

    def check_prompt(self, index: int, prompt: list[int], tokens: int, limit: int, what: str = "an answer") -> None:
        """Raises PromptRefused for a prompt that cannot be read, or not with `what` of so many tokens after it."""
        if not prompt:
            raise PromptRefused(index, "is empty")
        if len(prompt) + tokens > limit:
            raise PromptRefused(index, f"has {len(prompt)} tokens; with {what} of {tokens} the limit is {limit}")
        if not 0 <= min(prompt) <= max(prompt) < self.engine.vocab_size:
            raise PromptRefused(index, f"holds a token id outside the vocabulary of {self.engine.vocab_size}")

    async def answer(self, question: Question) -> list[Answer]:
        """The predictive of each prompt, in order."""
        if question.predictive == "linearized":
            return await self._linearized(question)
        if question.auto:
            return await self._answer_by_stages(question)
        compared = self._compared(question)
        found = await self.engine.score(
            question.prompts, question.candidates, question.adapters, states=compared is not None
        )
        rows = zip(found.log_p, found.top, found.cached, strict=True)
        return _with_familiarity([_answer(question, *each) for each in rows], compared, found)

    async def _linearized(self, question: Question) -> list[Answer]:
        """The answers by the linearised predictive; the engine reads the prompts too where their states are wanted."""
        served, compared = question.served, self._compared(question)
        if self.linearizer is None or served.posterior is None:
            raise RuntimeError(f"{served.name} has no linearised predictive")
        try:
            async with asyncio.TaskGroup() as group:
                moments = group.create_task(self.linearizer.moments(served.key, question.prompts, question.candidates))
                if compared is not None:
                    read = group.create_task(
                        self.engine.score(question.prompts, NOTHING, question.adapters, states=True)
                    )
        except ExceptionGroup as errors:
            raise first(errors) from errors
        coverage = question.options.coverage
        answers = await asyncio.to_thread(
            lambda: [Answer(from_gaussian(mean, spread, coverage=coverage)) for mean, spread in moments.result()]
        )
        return answers if compared is None else _with_familiarity(answers, compared, read.result())

    async def _answer_by_stages(self, question: Question) -> list[Answer]:
        """The answers by as many particles as each prompt needs, all prompts at once."""
        try:
            async with asyncio.TaskGroup() as group:  # one failure, or a client that has left, aborts all siblings
                tasks = [group.create_task(self._by_stages(question, prompt)) for prompt in question.prompts]
        except ExceptionGroup as errors:
            raise first(errors) from errors
        return [task.result() for task in tasks]

    async def _by_stages(self, question: Question, prompt: list[int]) -> Answer:
        """The answer to one prompt: a stage of particles after the other, until those left out no longer matter."""
        compared = self._compared(question)
        reads: list[Scores] = []
        for n in sequential.stages(question.particles):
            done = sum(each.top.shape[1] for each in reads)
            reads.append(
                await self.engine.score(
                    [prompt], question.candidates, question.adapters[done:n], states=compared is not None and not done
                )
            )
            log_p, top = torch.cat([each.log_p[0] for each in reads]), torch.cat([each.top[0] for each in reads])
            left_out = sequential.left_out(_normalised(question, log_p).exp(), question.weights)
            if left_out.negligible:
                break
        cached = min(each.cached[0] for each in reads)
        answer = replace(_answer(question, log_p, top, cached), left_out=left_out)
        return _with_familiarity([answer], compared, reads[0])[0]

    def judge(self, question: Question, answer: Answer, chosen: int | None = None) -> Judged:
        """What is known of candidate `chosen` (None: the most probable one) and of all others; counts the answer.

        A matching calibration gives the probabilities, and with them the answer and its confidence.
        """
        p = answer.predictive
        calibration = self._calibration(question, p)
        probability = p.probability if calibration is None else calibration.apply(p.probability)
        best = int(probability.argmax()) if chosen is None else chosen
        requested = self.store is not None and self.store.asks()
        judged = Judged(question, answer, calibration, probability, best, requested=requested)
        self.metrics.count_answer(question.served.owner, question.predictive, p, judged.confidence)
        if answer.familiarity is not None:
            self.metrics.familiarity.labels(question.served.owner).observe(answer.familiarity)
        if answer.left_out is not None:
            self.metrics.particles.labels(question.served.owner).observe(p.particles)
        return judged

    def _calibration(self, question: Question, p: Predictive) -> Record | None:
        """The record made for exactly this key."""
        key, posterior = self.key(question, p), question.served.posterior
        return None if key is None or posterior is None else records.find(posterior.calibration, key)

    def key(self, question: Question, p: Predictive) -> Key | None:
        """What a calibration of such answers belongs to: this base, posterior, template, predictive, number of
        particles and dtype, and so many answers where each question brings its own. None is of as many particles as
        needed: prompts that stop at one number are not like all prompts."""
        posterior = question.served.posterior
        if posterior is None or question.template is None or question.auto:
            return None
        return Key(
            base=self.base.hash,
            posterior=posterior.hash,
            template=question.template,
            predictive=question.predictive,
            particles=p.particles,
            dtype=self.dtype(question.predictive),
            answers=None if posterior.task.answers or question.kind else len(question.answers),
            question=question.kind,
        )

    def _compared(self, question: Question) -> Familiarity | None:
        """What tells how familiar the question is: of this posterior, the adapter that the engine asks first, and the
        engine's dtype. None where the server did not make the prompts."""
        posterior = question.served.posterior
        if posterior is None or question.template is None:
            return None
        return posterior.familiarity.get((adapter_of(question.predictive), cast(Dtype, self.engine.dtype)))

    def dtype(self, predictive: PredictiveName) -> Dtype:
        """What the base's weights are where this predictive is computed."""
        if predictive == "linearized" and self.linearizer is not None:
            return self.linearizer.dtype
        return cast(Dtype, self.engine.dtype)

    def unapplied(self, posteriors: Sequence[Posterior] | None = None) -> list[str]:
        """A line for each calibration, of these posteriors or of all, that is of another dtype than its predictive is
        computed in here."""
        lines = []
        for posterior in self.registry.posteriors if posteriors is None else posteriors:
            for text in posterior.texts:
                if text.dtype != self.engine.dtype:
                    lines.append(
                        f"a calibration of {posterior.name}'s texts was made in {text.dtype} and is not applied to "
                        f"texts in {self.engine.dtype}; run `posterior calibrate {posterior.path} ROWS --task text "
                        f"--dtype {self.engine.dtype}`"
                    )
            for key in posterior.calibration:
                dtype = self.dtype(key.predictive)
                if key.dtype == dtype or key.model_copy(update={"dtype": dtype}) in posterior.calibration:
                    continue
                particles = f" --particles {key.particles}" if key.predictive == "mixture" else ""
                lines.append(
                    f"the calibration of {posterior.name}'s {key.predictive} was made in {key.dtype} and is not "
                    f"applied to answers in {dtype}; run `posterior calibrate {posterior.path} ROWS "
                    f"--predictive {key.predictive}{particles} --dtype {dtype}`"
                )
        return lines

    async def read(
        self,
        served: Served,
        options: Uncertainty,
        *,
        inputs: Sequence[Mapping[str, str]] | None = None,
        prompts: Sequence[str] | None = None,
        conversations: Sequence[list[dict[str, Any]]] = (),
    ) -> Question:
        """The question that one kind of prompts comes to; `inputs` are fields of the posterior's template.

        Raises Refused.
        """
        if options.mixing is not None or options.tokens is not None:
            raise Refused("'mixing' and 'tokens' belong to text; leave them out, or give 'texts'", "mixing")
        task = None if served.posterior is None else served.posterior.task
        answers = options.answers or (task.answers if task is not None else None)
        if answers is None:
            raise Refused(f"the model {served.name!r} has no answers of its own; give 'answers'", "answers")
        ids = await self.prompt_ids(served, inputs=inputs, prompts=prompts, conversations=conversations)
        template = None
        if inputs is not None and task is not None and task.answers in (None, tuple(answers)):
            template = template_hash(task)
        return within_limits(self.question(served, ids, answers, options, template=template))

    async def prompt_ids(
        self,
        served: Served,
        *,
        inputs: Sequence[Mapping[str, str]] | None = None,
        prompts: Sequence[str] | None = None,
        conversations: Sequence[list[dict[str, Any]]] = (),
    ) -> list[list[int]]:
        """Token ids of one kind of prompts; `inputs` are fields of the posterior's template. Raises Refused."""
        if inputs is not None:
            if served.posterior is None:
                raise Refused("the base model has no template; give 'prompts' or 'messages'", "inputs")
            return await asyncio.to_thread(_rendered, served.posterior.task, self.tokenizer, inputs)
        if prompts is not None:
            body = {"model": served.key, "prompt": prompts, "max_tokens": 1}
            return await self.engine.render("completion", body)
        return [each for messages in conversations for each in await self._chat(served, messages)]

    async def _chat(self, served: Served, messages: list[dict[str, Any]]) -> list[list[int]]:
        """Token ids of a conversation, read as chat requests are."""
        check_messages(messages)
        return await self.engine.render("chat", {"model": served.key, "messages": messages})


def _answer(question: Question, log_p: torch.Tensor, top: torch.Tensor, cached: int) -> Answer:
    """The predictive of the first n adapters: log_p [n, C], top [n] and cached as in Scores, of one prompt."""
    weights = question.weights[: len(top)]
    own = _normalised(question, log_p)
    return Answer(
        from_particles(own, weights, question.options.coverage),
        own.exp(),
        unprompted(question.candidates, log_p, top, weights),
        cached=cached,
    )


def _with_familiarity(answers: list[Answer], compared: Familiarity | None, read: Scores) -> list[Answer]:
    """The answers, each with the familiarity of its prompt's state, if there is what to compare it with."""
    if compared is None or read.states is None:
        return answers
    shares = compared(read.states)
    return [replace(answer, familiarity=share) for answer, share in zip(answers, shares, strict=True)]


def _normalised(question: Question, log_p: torch.Tensor) -> torch.Tensor:
    """The logarithm of each adapter's probabilities of the candidates, [n, C], as the posterior scores them."""
    lengths = torch.tensor([len(tokens) for tokens in question.candidates])
    return question.served.scoring.scores(log_p, lengths).log_softmax(-1)


def unprompted(candidates: Candidates, log_p: torch.Tensor, top: torch.Tensor, weights: torch.Tensor) -> Unprompted:
    """What K particles of these weights would write; log_p [K, C] of the candidates, top [K] the most probable token.

    A candidate that another one begins is part of that one's probability.
    """
    known = set(candidates)
    apart = [not any(tokens[:n] in known for n in range(1, len(tokens))) for tokens in candidates]
    share = weights.double() / weights.double().sum()
    starts = torch.isin(top, torch.tensor([tokens[0] for tokens in candidates]))
    return Unprompted(float((share @ log_p.exp())[apart].sum().clamp(max=1)), bool(share @ starts.double() >= 0.5))


def predictive_name(served: Served, options: Uncertainty) -> PredictiveName:
    """The predictive to use. Raises Refused for one this model cannot give, or options it does not take."""
    name = options.predictive or served.predictives[0]
    if name not in served.predictives:
        raise Refused(
            f"the model {served.name!r} has no {name!r} predictive; it has {list(served.predictives)}", "predictive"
        )
    if name != "mixture" and options.particles is not None:
        raise Refused(f"'particles' belongs to the predictive 'mixture'; this is {name!r}", "particles")
    if name == "mixture" and isinstance(options.particles, int) and options.particles > len(served.particles):
        raise Refused(
            f"particles is {options.particles}; this server holds {len(served.particles)} of {served.name!r}",
            "particles",
        )
    if name == "linearized" and options.per_particle:
        raise Refused(
            "the linearised predictive has no particles; use the predictive 'mixture' for 'per_particle'",
            "per_particle",
        )
    return name


def within_limits(question: Question, copies: int = 1) -> Question:
    """The question, if its prompts are few enough for one request; each answer is sent `copies` times. Raises
    Refused."""
    numbers = len(question.prompts) * copies * len(question.candidates) ** 2
    check_size(question.evaluations, MAX_SEQUENCES, "evaluations")
    check_size(numbers, MAX_NUMBERS, "numbers in the response")
    return question


def check_size(size: int, limit: int, what: str) -> None:
    """Raises Refused for a request that is too large."""
    if size > limit:
        raise Refused(f"this request needs {size} {what}; the limit is {limit}: send fewer prompts at a time")


def _rendered(task: Task, tokenizer: Tokenizer, inputs: Sequence[Mapping[str, str]]) -> list[list[int]]:
    """Token ids of the posterior's own template, filled in. Raises Refused."""
    prompts = []
    for index, row in enumerate(inputs):
        try:
            prompts.append(task.prompt_ids(tokenizer, row, exact=True))
        except PosteriorError as error:
            raise Refused(f"input {index}: {error}", "inputs") from error
    return prompts
