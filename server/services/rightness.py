"""The probability that a text is right, and whether it is sure enough: posterior/calibration/rightness.py, applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from posterior.calibration.rightness import TextKey, TextKind, TextRecord, features, find
from posterior.models.devices import Dtype
from posterior.predictive.decoding import TextPredictive
from posterior.predictive.meanings import Meanings
from server.errors import Refused
from server.services.meanings import identity
from server.services.options import PredictiveName, Reason, TextUncertainty
from server.services.predictive import Service
from server.services.registry import Served
from server.services.risk import PLACE, threshold


@dataclass(frozen=True)
class Right:
    """What is known of a text. confidence: the probability that it is right; abstain: whether it is too unsure for the
    error that the request allows, None where it allows any; reason: of abstaining."""

    confidence: float
    calibration: TextRecord
    abstain: bool | None
    reason: Reason | None


@dataclass(frozen=True)
class Judge:
    """The record that a request's texts belong to. threshold: of its `risk`, None where any error is allowed."""

    record: TextRecord
    threshold: float | None

    @property
    def sampled(self) -> bool:
        """Whether it asks what the samples mean."""
        return self.record.key.samples is not None

    def __call__(self, text: TextPredictive, found: Meanings | None, own: int | None) -> Right:
        """What is known of a text of at least one token; `found`, `own`: as in `features`."""
        each = features(text, found, own)
        abstain = None if self.threshold is None else not self.record.answered(each, self.threshold)
        reason: Reason | None = None
        if abstain:
            reason = "unfamiliar" if self.record.unfamiliar(each) else "ambiguous"
        return Right(self.record.confidence(each), self.record, abstain, reason)


def judge(
    service: Service,
    served: Served,
    options: TextUncertainty,
    predictive: PredictiveName,
    particles: int,
    text: TextKind | None,
) -> Judge | None:
    """The judge of texts that come about like this (None: in a way that no record is of).

    Raises Refused for a `max_risk` that no record allows.
    """
    key = text_key(service, served, options, predictive, particles, text)
    record = None if key is None or served.posterior is None else find(served.posterior.texts, key)
    allowed = options.max_risk
    if allowed is None:
        return None if record is None else Judge(record, None)
    if text is None:
        raise Refused(
            "'max_risk' needs a text that a calibration can be of: give 'temperature' 0 or 'samples', and leave out "
            "what changes the tokens' probabilities (penalties, grammars, tools, 'mixing')",
            PLACE,
        )
    if record is None:
        raise Refused(
            "no calibration tells how often such texts are wrong; make one of graded answers with `posterior calibrate "
            "POSTERIOR ROWS --task text`, for this predictive, dtype and number of particles and samples, or leave out "
            "'max_risk'",
            PLACE,
        )
    return Judge(record, threshold(record.risk, allowed, "'max_risk' of this text: "))


def text_key(
    service: Service,
    served: Served,
    options: TextUncertainty,
    predictive: PredictiveName,
    particles: int,
    text: TextKind | None,
) -> TextKey | None:
    """What a calibration of texts that come about like this belongs to, with their samples if they have some; None of
    those that no calibration is of."""
    if text is None or served.posterior is None or predictive == "linearized":
        return None
    samples = options.samples
    return TextKey(
        base=service.base.hash,
        posterior=served.posterior.hash,
        predictive=predictive,
        particles=particles,
        dtype=cast(Dtype, service.engine.dtype),
        text=text,
        samples=samples,
        meaning=None if samples is None else identity(service, options.meaning or "exact"),
    )
