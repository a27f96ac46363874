"""Our part of answers as JSON (nats throughout), and server-sent events."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any

from posterior.data.decisions import Option, Value
from posterior.predictive.decoding import TextPredictive
from posterior.predictive.mixture import Predictive
from server.engine import Usage
from server.services.fields import Field
from server.services.questions import Judged
from server.services.rightness import Right
from server.services.semantics import Semantic
from server.services.texts import Written

MAX_MEANINGS = 20  # that a reply lists one by one
MAX_COVARIANCE = 16  # options of a decision; the matrix of more would be most of the reply

Reply = dict[str, Any] | AsyncIterator[str]  # a JSON object, or server-sent events


def answer_record(judged: Judged) -> dict[str, Any]:
    """The JSON of one answer. The posterior's own probabilities are named `uncalibrated` where there is a
    calibration."""
    return {**_choice(judged, judged.question.answers), "covariance": judged.answer.predictive.covariance.tolist()}


def decision_record(judged: Judged, options: Sequence[Option]) -> dict[str, Any]:
    """The JSON of the answer to a typed question: as `answer_record`, but options are named by their values, and the
    covariance of more than MAX_COVARIANCE options is left out."""
    record = _choice(judged, [option.value for option in options])
    if judged.answer.orders is not None:
        record["orders"] = asdict(judged.answer.orders)
    if len(options) <= MAX_COVARIANCE:
        record["covariance"] = judged.answer.predictive.covariance.tolist()
    return record


def _choice(judged: Judged, names: Sequence[Value]) -> dict[str, Any]:
    """The JSON of one answer, whose candidates have these names, without their covariance."""
    question, p, calibration = judged.question, judged.answer.predictive, judged.calibration
    record: dict[str, Any] = {
        "posterior": question.served.label,
        "predictive": question.predictive,
        "chosen_by": question.chosen_by,
        "particles": p.particles,
        "answer": names[judged.best],
        "confidence": judged.confidence,
        "calibrated": calibration is not None,
        "calibration": None if calibration is None else calibration.summary(),
        "logprob": math.log(max(judged.confidence, 1e-300)),
        "answers": _candidates(judged, names),
        "entropy": {"total": p.total, "aleatoric": p.aleatoric, "epistemic": p.epistemic},
        "variance": {"epistemic": float(p.variance[judged.best]), "total": float(p.total_variance[judged.best])},
        "effective_particles": p.effective_particles,
        "mc_error": float(p.mc_error[judged.best]),
    }
    if judged.answer.familiarity is not None:
        record["familiarity"] = judged.answer.familiarity
    if (left_out := judged.answer.left_out) is not None:
        record["left_out"] = asdict(left_out)
    if (inside := judged.prediction_set) is not None:
        record["prediction_set"] = [names[c] for c in inside]
    if judged.requested:
        record["label"] = "requested"
    if question.options.per_particle and judged.answer.particles is not None:
        record["per_particle"] = judged.answer.particles.tolist()
    return record


def _candidates(judged: Judged, names: Sequence[Value]) -> list[dict[str, Any]]:
    """The JSON of each candidate."""
    p = judged.answer.predictive
    columns = (judged.probability, p.variance, p.std, p.interval)
    rows = zip(names, *(column.tolist() for column in columns), strict=True)
    found: list[dict[str, Any]] = [
        {"answer": name, "probability": probability, "variance": variance, "std": std, "interval": interval}
        for name, probability, variance, std, interval in rows
    ]
    if judged.calibration is not None:
        for each, probability in zip(found, p.probability.tolist(), strict=True):
            each["uncalibrated"] = probability
    return found


def text_record(written: Written) -> dict[str, Any]:
    """The JSON of a text's uncertainty."""
    record: dict[str, Any] = {
        "posterior": written.posterior, "predictive": written.predictive, "confidence": None, "calibrated": False,
        "calibration": None, **right_record(written.right),
    }  # fmt: skip
    if written.text is not None:
        record |= {"mixing": written.mixing, "particles": written.particles, **_summary(written.text)}
        if written.prompt is not None:
            record["prompt"] = _summary(written.prompt)
        if written.per_particle:
            weight = written.text.log_weights[-1].exp().tolist()
            record["per_particle"] = {"logprob": written.text.particles.sum(0).tolist(), "weight": weight}
    if written.tokens is not None:
        record["tokens"] = _tokens(written.tokens, written.per_particle)
    return record


def right_record(right: Right | None) -> dict[str, Any]:
    """The JSON of what is known of whether a text is right: nothing where no calibration tells."""
    if right is None:
        return {}
    record = {"confidence": right.confidence, "calibrated": True, "calibration": right.calibration.summary()}
    if right.abstain is None:
        return record
    return {**record, "abstain": right.abstain, **({"reason": right.reason} if right.abstain else {})}


def attach(choice: dict[str, Any], written: Written | None) -> None:
    """Puts the uncertainty of a text, if there is any, into an element of `choices`."""
    if written is not None:
        choice["uncertainty"] = text_record(written)


def semantic_record(semantic: Semantic) -> dict[str, Any]:
    """The JSON of what the samples of a text said."""
    p = semantic.found.predictive
    counts = semantic.found.group.bincount().tolist()
    columns = (p.probability.tolist(), p.interval.tolist(), p.variance.tolist(), semantic.found.error.tolist(), counts)
    rows = zip((text for _, text in semantic.examples), *columns, strict=True)
    names = ("text", "probability", "interval", "variance", "standard_error", "samples")
    record: dict[str, Any] = {
        "samples": sum(counts),
        "truncated": semantic.truncated,
        "meaning": semantic.meaning,
        "returned": semantic.returned,
        "own": semantic.own,
        "entropy": {"total": p.total, "aleatoric": p.aleatoric, "epistemic": p.epistemic},
        "effective_particles": p.effective_particles,
        "meanings": [dict(zip(names, row, strict=True)) for row in rows][:MAX_MEANINGS],
    }
    if len(counts) > MAX_MEANINGS:
        rest = counts[MAX_MEANINGS:]
        record["others"] = {
            "meanings": len(rest), "samples": sum(rest), "probability": float(p.probability[MAX_MEANINGS:].sum())
        }  # fmt: skip
    return record


def field_record(field: Field) -> dict[str, Any]:
    """The JSON of what is known of a value in a structured text."""
    place, p = field.place, field.predictive
    rows = _probable(p)
    record: dict[str, Any] = {
        "path": place.leaf.pointer, "value": place.leaf.value, "tokens": place.stop - place.start, **rows[place.own]
    }  # fmt: skip
    if place.values is None or place.candidates is None:
        summary = _summary(field.text)
        record |= {"certainty": summary.pop("mean_token_probability"), **summary}
    else:
        probability = record["probability"]
        record["certainty"], record["logprob"] = probability, math.log(max(probability, 1e-300))
        record["entropy"] = {"total": p.total, "aleatoric": p.aleatoric, "epistemic": p.epistemic}
        record["effective_particles"] = p.effective_particles
    if place.values is not None:
        listed = [{"value": value, **row} for value, row in zip(place.values, rows, strict=False)]
        record["alternatives"] = listed if place.candidates is not None else None
    return record


def _probable(p: Predictive) -> list[dict[str, Any]]:
    """The probability of each value, and how much it varies over the posterior."""
    columns = (p.probability.tolist(), p.interval.tolist(), p.variance.tolist())
    return [dict(zip(("probability", "interval", "variance"), row, strict=True)) for row in zip(*columns, strict=True)]


def _summary(result: TextPredictive) -> dict[str, Any]:
    """The JSON of a whole text: sums over its tokens."""
    return {
        "mean_token_probability": result.mean_probability,
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


def usage_record(usage: Usage) -> dict[str, int]:
    """OpenAI's `usage`."""
    total = usage.prompt_tokens + usage.completion_tokens
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}


def event(record: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(record, ensure_ascii=False, allow_nan=False)}\n\n"
