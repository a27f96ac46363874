"""Text under a posterior: which mixture writes it, and its uncertainty (nats throughout)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from posterior.calibration.rightness import TextKey, TextKind
from posterior.predictive.decoding import Mixing, TextPredictive, text_predictive
from posterior.predictive.meanings import Meanings
from server.engine.gang import Trace
from server.errors import Refused
from server.services import meanings
from server.services.keeping import Keeper
from server.services.options import MAX_SAMPLED, MAX_SEQUENCES, PredictiveName, TextUncertainty, Uncertainty
from server.services.predictive import Service
from server.services.registry import Served
from server.services.rightness import Judge, Right, judge, text_key


@dataclass(frozen=True)
class Wanted:
    """What texts a request asks for: `n` for each of its prompts. `explicit`: it says how long they may be; `longest`:
    so many tokens, or what vLLM takes instead. `kind`: how those come about that are returned, None for a way that no
    calibration is of. `form`: the JSON schema that they follow, if their fields are asked for."""

    prompts: int
    n: int
    explicit: bool
    longest: int
    kind: TextKind | None = None
    form: Any = None


@dataclass(frozen=True)
class Written:
    """The uncertainty of a text, or of a part of it.

    `mixing` and `particles` are of the mixture that writes it; None and 0: one adapter does. `text`: of the whole text,
    once it is there; `right`: whether that is right, if a calibration tells; `prompt`: of its prompt, if that was
    scored; `tokens`: those to be listed one by one.
    """

    posterior: str | None
    predictive: str
    mixing: Mixing | None
    particles: int
    text: TextPredictive | None
    right: Right | None
    prompt: TextPredictive | None
    tokens: TextPredictive | None
    per_particle: bool


@dataclass
class Writer:
    """The uncertainty of one request's texts, as they are written.

    predictive: what writes: the mixture, or one adapter or the base ("map"). trace: of the texts that are returned;
    None for the MAP and the base where nothing is said of it. drawn: of the samples; the same one if a sample is
    returned. judge: of whether texts are right, if a calibration tells. form: the JSON schema of the texts, if their
    fields are asked for. keeper: of finished texts; key: what a calibration of such texts belongs to, if one can be.
    """

    service: Service
    served: Served
    options: TextUncertainty
    predictive: PredictiveName
    trace: Trace | None
    drawn: Trace | None = None
    judge: Judge | None = None
    form: Any = None
    keeper: Keeper | None = None
    key: TextKey | None = None
    counted_resumes: int = 0

    @property
    def annotates(self) -> bool:
        """Whether there is anything to say: the base has no posterior."""
        return self.served.posterior is not None

    def whole(self, choice: int) -> Written | None:
        """What is known of a finished choice; counts it."""
        if not self.annotates:
            return None
        if self.trace is None:
            return self._written()
        text = self.trace.text(choice)
        result = predictive_of(self.trace, text.rows[: text.delivered])
        self.service.metrics.count_text(self.served.owner, result, self.new_resumes())
        prompt = predictive_of(self.trace, text.prompt) if text.prompt else None
        right = None if self.judge is None or self.judge.sampled else self._right(result)
        return self._written(result, right, prompt, result if self.options.tokens else None)

    def right(self, choice: int, found: Meanings, own: int | None) -> Right | None:
        """Whether a finished choice is right, where that takes its samples: their meanings, and its own."""
        if self.judge is None or self.trace is None or not self.judge.sampled:
            return None
        text = self.trace.text(choice)
        return self._right(predictive_of(self.trace, text.rows[: text.delivered]), found, own)

    def _right(self, text: TextPredictive, found: Meanings | None = None, own: int | None = None) -> Right | None:
        """Whether a text is right; counts it."""
        if self.judge is None or not len(text.logprob):
            return None
        right = self.judge(text, found, own)
        metrics, owner = self.service.metrics, self.served.owner
        metrics.text_confidence.labels(owner).observe(right.confidence)
        if right.reason is not None:
            metrics.abstentions.labels(owner, right.reason).inc()
        return right

    def part(self, choice: int, *, last: bool) -> Written | None:
        """What a chunk of a stream says: the tokens handed out since the choice's last chunk and, at its end, the
        rest."""
        if not self.annotates:
            return None
        tokens = None
        if self.trace is not None and self.options.tokens is not False:
            text = self.trace.text(choice)
            if text.described < text.delivered:
                tokens = predictive_of(self.trace, text.rows[text.described : text.delivered], text.log_weights)
                text.described, text.log_weights = text.delivered, tokens.log_weights[-1]
        if not last:
            return None if tokens is None else self._written(tokens=tokens)
        whole = self.whole(choice)
        return whole and replace(whole, tokens=tokens)

    def keep(
        self,
        id: str,
        choice: dict[str, Any],
        number: int | None = None,
        meanings: Meanings | None = None,
        own: int | None = None,
    ) -> None:
        """Keeps a finished element of `choices`, if there is anything known of it, so that an outcome can name it.

        Args:
            id: of the reply.
            number: of the text in the trace, where it is not the choice's index.
            meanings, own: of its samples, and its own meaning.
        """
        record = choice.get("uncertainty")
        if self.keeper is None or record is None or self.service.store is None:
            return
        written = None
        if self.trace is not None:
            text = self.trace.text(choice["index"] if number is None else number)
            written = predictive_of(self.trace, text.rows[: text.delivered])
        self.keeper.text(id, choice["index"], self.served, record, self.key, written, meanings, own)

    def new_resumes(self) -> int:
        """How often siblings began again since this was last asked."""
        traces = {id(trace): trace for trace in (self.trace, self.drawn) if trace is not None}
        total = sum(trace.resumed for trace in traces.values())
        new, self.counted_resumes = total - self.counted_resumes, total
        return new

    def _written(
        self,
        text: TextPredictive | None = None,
        right: Right | None = None,
        prompt: TextPredictive | None = None,
        tokens: TextPredictive | None = None,
    ) -> Written:
        """What is known now, with the request's head."""
        return Written(
            posterior=self.served.label,
            predictive=self.predictive,
            mixing=None if self.trace is None else self.trace.mixing,
            particles=0 if self.trace is None else len(self.trace.adapters),
            text=text,
            right=right,
            prompt=prompt,
            tokens=tokens,
            per_particle=self.options.per_particle,
        )


def writer(service: Service, served: Served, options: TextUncertainty, wanted: Wanted) -> Writer:
    """The writer of the particles that are asked for. Raises Refused for what this model cannot give."""
    _check_samples(served, options)
    if options.samples is not None:
        meanings.check(service, options.meaning or "exact", wanted.prompts, wanted.n)
    if options.fields:
        _check_weighed(served, options, "fields", "the text before them")
    predictive, trace = mixture_of(served, options, explicit=wanted.explicit)
    k = len(trace.adapters)
    _check_size(wanted, k, options)
    found = judge(service, served, options, predictive, k, wanted.kind)
    if predictive == "map" and options.samples is None and found is None and wanted.form is None:
        return Writer(service, served, options, predictive, None)  # of whose text nothing more is said
    key = text_key(service, served, options, predictive, k, wanted.kind)
    return Writer(service, served, options, predictive, trace, _drawn(trace, options), found, wanted.form, key=key)


def mixture_of(served: Served, options: Uncertainty, *, explicit: bool = False) -> tuple[PredictiveName, Trace]:
    """Which predictive of a text is asked for, and a trace of its particles, or of theta* or the base alone ("map").

    Raises Refused for what this model cannot give.
    """
    if options.predictive == "linearized":
        raise Refused(
            "text under the 'linearized' predictive is not served yet: use 'mixture' or 'map', or give 'answers' for a "
            "distribution over them",
            "uncertainty.predictive",
        )
    if options.particles == "auto":
        raise Refused(
            "particles 'auto' belongs to a choice among 'answers', and this is text; give a number of particles, or "
            "give 'answers'",
            "uncertainty.particles",
        )
    unsaid = options.predictive is None and options.mixing is None
    if options.predictive == "map" or not served.particles or (unsaid and options.particles == 1):
        if options.predictive == "mixture" or options.mixing is not None or (options.particles or 1) != 1:
            raise Refused(
                f"the model {served.name!r} writes with one adapter here; 'particles' and 'mixing' need the predictive "
                "'mixture' of a posterior",
                "uncertainty.predictive",
            )
        return "map", Trace((served.map,), (1.0,), "sequence", explicit)
    k = options.particles or len(served.particles)
    if k > len(served.particles):
        raise Refused(
            f"particles is {k}; this server holds {len(served.particles)} of {served.name!r}", "uncertainty.particles"
        )
    return "mixture", Trace(served.particles[:k], served.weights[:k], options.mixing or "sequence", explicit)


def _drawn(trace: Trace, options: TextUncertainty) -> Trace | None:
    """The trace of the samples, if there are to be any: that of the text if one of them is returned."""
    if options.samples is None:
        return None
    if options.returned != "greedy":
        return trace
    return Trace(trace.adapters, trace.weights, trace.mixing, trace.explicit)


def _check_samples(served: Served, options: TextUncertainty) -> None:
    """Raises Refused for options that samples cannot honour, or that belong to them."""
    if options.samples is None:
        for name, value in (("return", options.returned), ("meaning", options.meaning)):
            if value is not None:
                raise Refused(f"{name!r} belongs to 'samples'; give these too, or leave it out", f"uncertainty.{name}")
        return
    _check_weighed(served, options, "samples", "the whole text")


def _check_weighed(served: Served, options: TextUncertainty, name: str, text: str) -> None:
    """Raises Refused where `name` cannot be weighed by what each particle gives to the `text`."""
    if served.posterior is None:
        raise Refused(f"{name!r} need a posterior, and {served.name!r} is the base alone", f"uncertainty.{name}")
    if options.mixing == "token":
        raise Refused(
            f"{name!r} are weighed by what each particle gives to {text}, which is 'sequence' mixing; leave 'mixing' "
            "out",
            "uncertainty.mixing",
        )


def _check_size(wanted: Wanted, particles: int, options: TextUncertainty) -> None:
    """Raises Refused for a request of more texts than are written at a time, or of too many tokens of samples."""
    sequences = wanted.prompts * wanted.n * particles
    texts = f"n = {wanted.n}" if options.samples is None else _counted(options.samples, wanted.n)
    product = f"{wanted.prompts} prompts x {texts} x {particles} particles"
    if sequences > MAX_SEQUENCES:
        raise Refused(
            f"{product} are {sequences} sequences; one request may have {MAX_SEQUENCES}: send fewer prompts, or ask "
            f"for fewer {'choices' if options.samples is None else 'samples'} or 'particles'",
            "n" if options.samples is None else "uncertainty.samples",
        )
    if options.samples is not None and sequences * wanted.longest > MAX_SAMPLED:
        raise Refused(
            f"{product} x {wanted.longest} tokens, the most that a text may have, are {sequences * wanted.longest}; "
            f"one request may have {MAX_SAMPLED}: give a smaller 'max_tokens', or ask for fewer samples or 'particles'",
            "max_tokens",
        )


def _counted(samples: int, texts: int) -> str:
    """The texts of a prompt in words."""
    return f"{samples} samples" if texts == samples else f"({samples} samples + 1 greedy text)"


def predictive_of(trace: Trace, rows: list[list[float]], log_weights: torch.Tensor | None = None) -> TextPredictive:
    """The mixture's predictive of the tokens that left `rows` in the trace; `log_weights`: the particles' before them,
    None: the posterior's."""
    table = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(trace.adapters) + 2)
    if log_weights is None:
        log_weights = torch.tensor(trace.weights, dtype=torch.float64).log()
    return text_predictive(table[:, :-2], log_weights, trace.mixing, table[:, -2], table[:, -1])
