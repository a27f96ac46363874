"""Distributions as lines of text: a bar for each answer, and where the doubt comes from."""

from collections.abc import Callable, Sequence
from typing import Any

from openai.types.decision_create_params import Question

from posterior_client._decisions import DecisionAnswer, DecisionResponse, DecisionUncertainty, Refusal, ScoreAnswer
from posterior_client._types import Entropy, Prediction, Predictive, Probable

WIDTH = 32  # cells of a bar from probability 0 to 1
UNICODE = "█▓░·"  # below the interval; interval up to the mean; interval above the mean; beyond
ASCII = "#=-."
REASONS = {
    "ambiguous": "the question itself leaves it open, and more training rows would not help",
    "unfamiliar": "the posterior knows too little about such inputs, and more training rows would help",
}


def of_prediction(prediction: Prediction, glyphs: str = UNICODE) -> str:
    """The answer, a bar with its interval for every candidate, and where the doubt comes from."""
    ranked = sorted(prediction.answers, key=lambda one: -one.probability)
    return "\n".join(
        [
            f"{printable(prediction.answer)}  ({_confidence(prediction)}, {_calibration(prediction)})",
            "",
            *_rows([printable(one.answer) for one in ranked], ranked, glyphs),
            "",
            *_set(prediction.prediction_set, str),
            *_familiarity(prediction),
            doubt(prediction.entropy),
            _source(prediction),
        ]
    )


def of_decisions(questions: Sequence[Question], response: DecisionResponse, glyphs: str = UNICODE) -> str:
    """As `of_prediction`, for each question; one that is not answered says why.

    Args:
        questions: as they were asked.
    """
    parts = [_decided(*each, glyphs) for each in zip(questions, response.answers, strict=True)]
    return "\n\n".join([*parts, _source(response.answers[0].uncertainty)])


def bar(answer: Probable, glyphs: str) -> str:
    """WIDTH cells: solid below the interval, two shades inside it that meet at the mean, dots beyond.

    >>> bar(Probable(probability=.5, variance=.01, std=.1, interval=(.25, .75)), "#=-.")
    '########========--------........'
    """
    low, high = answer.interval
    edges = [round(WIDTH * value) for value in (low, answer.probability, high, 1.0)]
    cells, start = "", 0
    for glyph, end in zip(glyphs, edges, strict=True):
        cells += glyph * (end - start)
        start = max(start, end)
    return cells


def doubt(entropy: Entropy) -> str:
    """The entropy and its two parts, in one line."""
    return (
        f"entropy {entropy.total:.3f} nats = {entropy.aleatoric:.3f} aleatoric + {entropy.epistemic:.3f} epistemic"
        f" ({entropy.epistemic_share:.0%} epistemic)"
    )


def printable(answer: str) -> str:
    """An answer as a terminal may show it."""
    # It starts with the space that joins it to the prompt; control characters could drive the terminal.
    return "".join(c if c.isprintable() else "?" for c in answer.strip()) or repr(answer)


def _decided(question: Question, answer: DecisionAnswer, glyphs: str) -> str:
    """One question with its answer."""
    found = answer.uncertainty
    options = found.answers
    if question["type"] == "choice":
        options = tuple(sorted(options, key=lambda one: -one.probability))
    lines = [printable(str(question["instructions"])), *_verdict(question, answer), ""]
    lines += _rows([_named(question, one.answer) for one in options], options, glyphs)
    lines += ["", *_set(found.prediction_set, lambda value: _named(question, value)), *_orders(found)]
    lines += _familiarity(found)
    return "\n".join([*lines, doubt(found.entropy)])


def _verdict(question: Question, answer: DecisionAnswer) -> list[str]:
    """The answer in one line, or why there is none and what it would have been."""
    found = answer.uncertainty
    level = f", level {answer.score:.2f} of 0 to {len(found.answers) - 1}" if isinstance(answer, ScoreAnswer) else ""
    line = f"{_named(question, found.answer)}  ({_confidence(found)}{level}, {_calibration(found)})"
    if not isinstance(answer, Refusal):
        return [line]
    reason = found.reason or "unknown"
    return [f"not answered, {reason}: {REASONS.get(reason, 'the server does not say why')}", f"it would be: {line}"]


def _named(question: Question, value: object) -> str:
    """What the question calls an option."""
    if question["type"] == "predicate":
        return "yes" if value is True else "no"
    if question["type"] == "score" and isinstance(value, int):
        return printable(list(question["levels"])[value]["label"])
    return printable(str(value))


def _rows(names: Sequence[str], answers: Sequence[Probable], glyphs: str) -> list[str]:
    """A line for each answer."""
    width = max(map(len, names))
    pairs = zip(names, answers, strict=True)
    return [
        f"  {name:<{width}}  {one.probability:.3f}  {bar(one, glyphs)}  [{one.interval[0]:.3f}, {one.interval[1]:.3f}]"
        for name, one in pairs
    ]


def _set(inside: Sequence[Any] | None, named: Callable[[Any], str]) -> list[str]:
    return [] if inside is None else [f"prediction set: {', '.join(printable(named(each)) for each in inside)}"]


def _orders(found: DecisionUncertainty) -> list[str]:
    if found.orders is None:
        return []
    return [
        f"asked in {found.orders.n} orders: total variation from their average up to {found.orders.total_variation:.3f}"
    ]


def _familiarity(found: Predictive) -> list[str]:
    if found.familiarity is None:
        return []
    return [f"familiarity {found.familiarity:.3f}: {1 - found.familiarity:.0%} of the held-out rows are less strange"]


def _confidence(found: Predictive) -> str:
    return f"confidence {found.confidence:.2f}"


def _calibration(found: Predictive) -> str:
    return "calibrated" if found.calibrated else "not calibrated"


def _source(found: Predictive) -> str:
    return f"{found.posterior or 'base model'}, {found.predictive} predictive"
