"""Answers on their way to the store, so that outcomes can name them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posterior.calibration.rightness import TextKey, features
from posterior.data.decisions import Choice, Predicate, Score
from posterior.predictive.decoding import TextPredictive
from posterior.predictive.meanings import Meanings
from server.services.predictive import Service
from server.services.questions import Judged
from server.services.registry import Served
from server.store.values import Answer, Reply


@dataclass(frozen=True)
class Keeper:
    """Keeps the answers to one request: its body, and whose they are (server/access). Does nothing where the server
    has no store."""

    service: Service
    owner: str
    body: Mapping[str, Any]
    created: float = field(default_factory=time.time)

    def choices(
        self,
        id: str,
        judged: Sequence[Judged],
        questions: Sequence[Predicate | Choice | Score] | None = None,
        max_risk: float | None = None,
    ) -> None:
        """Keeps the answers of the reply `id`, in order; `questions`: those of a decision."""
        if self.service.store is None:
            return
        answers = {}
        for item, each in enumerate(judged):
            question = None if questions is None else questions[item]
            answers[item] = _choice(self.service, each, question, max_risk)
        self._keep(id, judged[0].question.served, answers)

    def text(
        self,
        id: str,
        item: int,
        served: Served,
        record: dict[str, Any],
        key: TextKey | None,
        written: TextPredictive | None,
        meanings: Meanings | None = None,
        own: int | None = None,
    ) -> None:
        """Keeps a text of the reply `id`, and asks for the labels of some.

        Args:
            record: what its client is told, `uncertainty`; an asked label is added to it.
            key: what a calibration of such texts belongs to, None of those that none can be of.
            written: its predictive, None where no mixture and no samples asked for it.
            meanings, own: of its samples, and the number of its own meaning.
        """
        if self.service.store is None:
            return
        requested = self.service.store.asks()
        if requested:
            record["label"] = "requested"
        calibrated = bool(record["calibrated"])
        answer = Answer(
            kind="text",
            predictive=record["predictive"],
            particles=record.get("particles") or 1,
            dtype=self.service.dtype(record["predictive"]),
            key=None if key is None else key.model_dump(),
            confidence=record["confidence"] if calibrated else None,
            calibrated=calibrated,
            max_risk=(self.body.get("uncertainty") or {}).get("max_risk"),
            refusal=record.get("reason"),
            total=None if written is None else float(written.total.sum()),
            epistemic=None if written is None else float(written.epistemic.sum()),
            features=None if written is None or not len(written.logprob) else features(written, meanings, own),
            requested=requested,
        )
        self._keep(id, served, {item: answer})

    def _keep(self, id: str, served: Served, answers: Mapping[int, Answer]) -> None:
        store, posterior = self.service.store, served.posterior
        if store is None:
            return
        store.keep(
            Reply(
                owner=self.owner,
                id=id,
                created=self.created,
                model=served.name,
                posterior=None if posterior is None else posterior.name,
                hash=None if posterior is None else posterior.hash,
                base=self.service.base.hash,
                answers=answers,
                request=self.body if store.requests else None,
            )
        )


def _choice(
    service: Service, judged: Judged, question: Predicate | Choice | Score | None, max_risk: float | None
) -> Answer:
    """An answer to a question of candidates, or of options."""
    asked, p = judged.question, judged.answer.predictive
    key, inside = service.key(asked, p), judged.prediction_set
    return Answer(
        kind="answers" if question is None else question.type,
        predictive=asked.predictive,
        particles=p.particles,
        dtype=service.dtype(asked.predictive),
        key=None if key is None else key.model_dump(),
        options=asked.answers if question is None else tuple(option.value for option in question.options),
        probability=tuple(p.probability.tolist()),
        best=judged.best,
        confidence=judged.confidence,
        calibrated=judged.calibration is not None,
        max_risk=max_risk,
        refusal=judged.refusal,
        familiarity=judged.answer.familiarity,
        total=p.total,
        epistemic=p.epistemic,
        prediction_set=None if inside is None else tuple(inside),
        coverage=None if inside is None else asked.options.coverage,
        requested=judged.requested,
    )
