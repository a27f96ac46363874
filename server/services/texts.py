"""Text under a posterior: which mixture writes it, and its uncertainty (nats throughout)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from posterior.predictive.decoding import Mixing, TextPredictive, text_predictive
from server.engine.gang import Trace
from server.errors import Refused
from server.services.options import MAX_SEQUENCES, Uncertainty
from server.services.predictive import Service
from server.services.registry import Served


@dataclass(frozen=True)
class Wanted:
    """How many texts a request asks for: `n` for each of its prompts. `explicit`: it says how long they may be."""

    prompts: int
    n: int
    explicit: bool


@dataclass(frozen=True)
class Written:
    """The uncertainty of a text, or of a part of it.

    `mixing` and `particles` are of the mixture that writes it; None and 0: one adapter does. `text`: of the whole text,
    once it is there; `prompt`: of its prompt, if that was scored; `tokens`: those to be listed one by one.
    """

    posterior: str | None
    predictive: str
    mixing: Mixing | None
    particles: int
    text: TextPredictive | None
    prompt: TextPredictive | None
    tokens: TextPredictive | None
    per_particle: bool


@dataclass
class Writer:
    """The uncertainty of one request's texts, as they are written. `trace` is None for the MAP and the base alone."""

    service: Service
    served: Served
    options: Uncertainty
    trace: Trace | None
    counted_resumes: int = 0

    @property
    def predictive(self) -> str:
        """What writes: the mixture, or one adapter or the base ("map")."""
        return "map" if self.trace is None else "mixture"

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
        new, self.counted_resumes = self.trace.resumed - self.counted_resumes, self.trace.resumed
        self.service.metrics.count_text(self.served.owner, result, new)
        prompt = predictive_of(self.trace, text.prompt) if text.prompt else None
        return self._written(result, prompt, result if self.options.tokens else None)

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

    def _written(
        self,
        text: TextPredictive | None = None,
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
            prompt=prompt,
            tokens=tokens,
            per_particle=self.options.per_particle,
        )


def writer(service: Service, served: Served, options: Uncertainty, wanted: Wanted) -> Writer:
    """The writer of the particles that are asked for. Raises Refused for what this model cannot give."""
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
    alone = options.predictive == "map" or not served.particles or (unsaid and options.particles == 1)
    if alone:
        if options.predictive == "mixture" or options.mixing is not None or (options.particles or 1) != 1:
            raise Refused(
                f"the model {served.name!r} writes with one adapter here; 'particles' and 'mixing' need the predictive "
                "'mixture' of a posterior",
                "uncertainty.predictive",
            )
        _check_size(wanted, 1)
        return Writer(service, served, options, None)
    k = options.particles or len(served.particles)
    if k > len(served.particles):
        raise Refused(
            f"particles is {k}; this server holds {len(served.particles)} of {served.name!r}", "uncertainty.particles"
        )
    _check_size(wanted, k)
    trace = Trace(served.particles[:k], served.weights[:k], options.mixing or "sequence", wanted.explicit)
    return Writer(service, served, options, trace)


def _check_size(wanted: Wanted, particles: int) -> None:
    """Raises Refused for a request of more texts than are written at a time."""
    sequences = wanted.prompts * wanted.n * particles
    if sequences > MAX_SEQUENCES:
        raise Refused(
            f"{wanted.prompts} prompts x n = {wanted.n} x {particles} particles are {sequences} sequences; one request "
            f"may have {MAX_SEQUENCES}: send fewer prompts, or ask for fewer choices or 'particles'",
            "n",
        )


def predictive_of(trace: Trace, rows: list[list[float]], log_weights: torch.Tensor | None = None) -> TextPredictive:
    """The mixture's predictive of the tokens that left `rows` in the trace; `log_weights`: the particles' before them,
    None: the posterior's."""
    table = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(trace.adapters) + 2)
    if log_weights is None:
        log_weights = torch.tensor(trace.weights, dtype=torch.float64).log()
    return text_predictive(table[:, :-2], log_weights, trace.mixing, table[:, -2], table[:, -1])
