"""Distributions at the terminal: a bar with an interval for each answer, and where the doubt comes from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openai.types.decision_create_params import Question
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from posterior_client._decisions import DecisionAnswer, DecisionResponse, DecisionUncertainty, Refusal, ScoreAnswer
from posterior_client._types import Entropy, Prediction, Predictive, Probable, Uncertainty

NARROW, WIDE = 8, 32  # cells of a bar from probability 0 to 1: at least, and where there is room
UNICODE, ASCII = "█▓░·", "#=-."  # below the interval; interval up to the mean; interval above the mean; beyond
STYLES = ("#0072b2", "#56b4e9", "#56b4e9", "dim")
REFUSED = "bold #d55e00"
REASONS = {
    "ambiguous": "the question itself leaves it open, and more training rows would not help",
    "unfamiliar": "the posterior knows too little about such inputs, and more training rows would help",
}


def of_prediction(prediction: Prediction) -> Group:
    """The answer, a row for every candidate, and where the doubt comes from."""
    ranked = sorted(prediction.answers, key=lambda one: -one.probability)
    return Group(
        Text(f"{printable(prediction.answer)}  ({_confidence(prediction)}, {calibration(prediction)})", "bold"),
        Text(),
        Rows([printable(one.answer) for one in ranked], ranked),
        Text(),
        *_set(prediction.prediction_set, str),
        *_familiarity(prediction),
        Text(doubt(prediction.entropy)),
        Text(source(prediction), "dim"),
    )


def of_decisions(questions: Sequence[Question], response: DecisionResponse) -> Group:
    """As `of_prediction`, for each question; one that is not answered says why.

    Args:
        questions: as they were asked.
    """
    parts: list[RenderableType] = []
    for question, answer in zip(questions, response.answers, strict=True):
        parts += [*_decided(question, answer), Text()]
    return Group(*parts, Text(source(response.answers[0].uncertainty), "dim"))


@dataclass(frozen=True)
class Rows:
    """A line for each answer: its name, its probability, on a terminal its bar, and its interval."""

    names: Sequence[str]
    answers: Sequence[Probable]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(overflow="fold")
        table.add_column(no_wrap=True)
        if options.is_terminal:
            table.add_column()
        table.add_column(no_wrap=True)
        best = max(one.probability for one in self.answers)
        for name, one in zip(self.names, self.answers, strict=True):
            style = "bold" if one.probability == best else ""
            low, high = one.interval
            bar = [Bar(one)] if options.is_terminal else []
            table.add_row(
                Text(name), Text(f"{one.probability:.3f}"), *bar, Text(f"[{low:.3f}, {high:.3f}]"), style=style
            )
        yield Padding.indent(table, 2)


@dataclass(frozen=True)
class Bar:
    """A probability: solid below its interval, two shades inside the interval that meet at the mean, dots beyond."""

    answer: Probable

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(NARROW, WIDE).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(WIDE, options.max_width)
        low, high = self.answer.interval
        edges = [round(width * value) for value in (low, self.answer.probability, high, 1.0)]
        bar, start = Text(), 0
        for glyph, style, end in zip(ASCII if options.ascii_only else UNICODE, STYLES, edges, strict=True):
            bar.append(glyph * (end - start), style)
            start = max(start, end)
        yield bar


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


def calibration(found: Uncertainty) -> str:
    """Whether the confidence is calibrated, in words."""
    return "calibrated" if found.calibrated else "not calibrated"


def source(found: Uncertainty) -> str:
    """The posterior and how it was averaged, in one line."""
    return f"{found.posterior or 'base model'}, {found.predictive} predictive"


def _decided(question: Question, answer: DecisionAnswer) -> list[RenderableType]:
    """One question with its answer."""
    found = answer.uncertainty
    options = found.answers
    if question["type"] == "choice":
        options = tuple(sorted(options, key=lambda one: -one.probability))
    return [
        Text(printable(str(question["instructions"]))),
        *_verdict(question, answer),
        Text(),
        Rows([_named(question, one.answer) for one in options], options),
        Text(),
        *_set(found.prediction_set, lambda value: _named(question, value)),
        *_orders(found),
        *_familiarity(found),
        Text(doubt(found.entropy)),
    ]


def _verdict(question: Question, answer: DecisionAnswer) -> list[Text]:
    """The answer in one line, or why there is none and what it would have been."""
    found = answer.uncertainty
    level = f", level {answer.score:.2f} of 0 to {len(found.answers) - 1}" if isinstance(answer, ScoreAnswer) else ""
    line = f"{_named(question, found.answer)}  ({_confidence(found)}{level}, {calibration(found)})"
    if not isinstance(answer, Refusal):
        return [Text(line, "bold")]
    reason = found.reason or "unknown"
    said = f"not answered, {reason}: {REASONS.get(reason, 'the server does not say why')}"
    return [Text(said, REFUSED), Text(f"it would be: {line}")]


def _named(question: Question, value: object) -> str:
    """What the question calls an option."""
    if question["type"] == "predicate":
        return "yes" if value is True else "no"
    if question["type"] == "score" and isinstance(value, int):
        return printable(list(question["levels"])[value]["label"])
    return printable(str(value))


def _set(inside: Sequence[Any] | None, named: Callable[[Any], str]) -> list[Text]:
    return [] if inside is None else [Text(f"prediction set: {', '.join(printable(named(each)) for each in inside)}")]


def _orders(found: DecisionUncertainty) -> list[Text]:
    if found.orders is None:
        return []
    n, farthest = found.orders.n, found.orders.total_variation
    return [Text(f"asked in {n} orders: total variation from their average up to {farthest:.3f}")]


def _familiarity(found: Predictive) -> list[Text]:
    if found.familiarity is None:
        return []
    stranger = f"{1 - found.familiarity:.0%} of the held-out rows are less strange"
    return [Text(f"familiarity {found.familiarity:.3f}: {stranger}")]


def _confidence(found: Predictive) -> str:
    return f"confidence {found.confidence:.2f}"
