"""Text under a posterior: which mixture writes it, and its uncertainty in JSON (nats throughout)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from posterior.predictive.decoding import TextPredictive, text_predictive
from server.engine.gang import Trace
from server.errors import bad_request
from server.schemas import Uncertainty, check_size
from server.services.predictive import Service
from server.services.registry import Served


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
        return "map" if self.trace is None else "mixture"

    @property
    def annotates(self) -> bool:
        """Whether there is anything to say: the base has no posterior."""
        return self.served.posterior is not None

    def whole(self, choice: int) -> dict[str, Any] | None:
        """The record of a finished choice."""
        if not self.annotates:
            return None
        record = self._head()
        if self.trace is None:
            return record
        text = self.trace.text(choice)
        result = predictive_of(self.trace, text.rows[: text.delivered])
        assert self.served.posterior is not None
        new, self.counted_resumes = self.trace.resumed - self.counted_resumes, self.trace.resumed
        self.service.metrics.count_text(self.served.posterior.name, result, new)
        after = result.log_weights[-1].exp()
        record |= {
            "mixing": self.trace.mixing,
            "particles": len(self.trace.adapters),
            **_summary(result),
        }
        if text.prompt:
            record["prompt"] = _summary(predictive_of(self.trace, text.prompt))
        if self.options.per_particle:
            record["per_particle"] = {"logprob": result.particles.sum(0).tolist(), "weight": after.tolist()}
        if self.options.tokens:
            record["tokens"] = _tokens(result, self.options.per_particle)
        return record

    def _head(self) -> dict[str, Any]:
        return {
            "posterior": self.served.label, "predictive": self.predictive, "calibrated": False, "calibration": None
        }  # fmt: skip

    def part(self, choice: int, *, last: bool) -> dict[str, Any] | None:
        """What a chunk of a stream says: the tokens handed out since the choice's last chunk and, at its end, the
        rest."""
        if not self.annotates:
            return None
        tokens: list[dict[str, Any]] = []
        if self.trace is not None and self.options.tokens is not False:
            text = self.trace.text(choice)
            if text.described < text.delivered:
                result = predictive_of(self.trace, text.rows[text.described : text.delivered], text.log_weights)
                tokens = _tokens(result, self.options.per_particle)
                text.described, text.log_weights = text.delivered, result.log_weights[-1]
        if not last:
            return self._head() | {"tokens": tokens} if tokens else None
        record = self.whole(choice)
        if record is not None:
            record.pop("tokens", None)
        return record and (record | {"tokens": tokens} if tokens else record)


def writer(service: Service, served: Served, options: Uncertainty, body: Mapping[str, Any]) -> Writer:
    """Which particles write the text. Raises ApiError 400 for what this model cannot give."""
    if options.predictive == "linearized":
        raise bad_request(
            "text under the 'linearized' predictive is not served yet: use 'mixture' or 'map', or give 'answers' for a "
            "distribution over them",
            "uncertainty.predictive",
        )
    unsaid = options.predictive is None and options.mixing is None
    alone = options.predictive == "map" or not served.particles or (unsaid and options.particles == 1)
    if alone:
        if options.predictive == "mixture" or options.mixing is not None or (options.particles or 1) != 1:
            raise bad_request(
                f"the model {served.name!r} writes with one adapter here; 'particles' and 'mixing' need the predictive "
                "'mixture' of a posterior",
                "uncertainty.predictive",
            )
        check_size(*_asked(body), particles=1)
        return Writer(service, served, options, None)
    k = options.particles or len(served.particles)
    if k > len(served.particles):
        raise bad_request(
            f"particles is {k}; this server holds {len(served.particles)} of {served.name!r}", "uncertainty.particles"
        )
    check_size(*_asked(body), particles=k)
    explicit = body.get("max_tokens") is not None or body.get("max_completion_tokens") is not None
    trace = Trace(served.particles[:k], served.weights[:k], options.mixing or "sequence", explicit)
    return Writer(service, served, options, trace)


def _asked(body: Mapping[str, Any]) -> tuple[int, int]:
    """How many prompts a body holds, and how many choices it asks of each; vLLM checks their forms."""
    prompt, n = body.get("prompt"), body.get("n")
    several = isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt)
    return len(prompt) if several and prompt else 1, n if isinstance(n, int) else 1


def predictive_of(trace: Trace, rows: list[list[float]], log_weights: torch.Tensor | None = None) -> TextPredictive:
    """The mixture's predictive of the tokens that left `rows` in the trace; `log_weights`: the particles' before them,
    None: the posterior's."""
    table = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(trace.adapters) + 2)
    if log_weights is None:
        log_weights = torch.tensor(trace.weights, dtype=torch.float64).log()
    return text_predictive(table[:, :-2], log_weights, trace.mixing, table[:, -2], table[:, -1])


def _summary(result: TextPredictive) -> dict[str, Any]:
    return {
        "confidence": result.confidence,
        "logprob": float(result.logprob.sum()),
        "expected_logprob": result.expected,
        "information": result.information,
        "entropy": {name: float(getattr(result, name).sum()) for name in ("total", "aleatoric", "epistemic")},
        "effective_particles": 1 / float(result.log_weights[-1].exp().square().sum()),
        "mc_error": result.mc_error,
    }


def _tokens(result: TextPredictive, per_particle: bool) -> list[dict[str, Any]]:
    """A record for each token."""
    records: list[dict[str, Any]] = []
    for t in range(len(result.logprob)):
        records.append(
            {
                "logprob": float(result.logprob[t]),
                "entropy": {n: float(getattr(result, n)[t]) for n in ("total", "aleatoric", "epistemic")},
                "epistemic_variance": float(result.variance[t]),
                "effective_particles": float(result.effective_particles[t]),
            }
        )
        if per_particle:
            records[-1]["per_particle"] = {
                "logprob": result.particles[t].tolist(),
                "weight": result.log_weights[t].exp().tolist(),
            }
    return records
