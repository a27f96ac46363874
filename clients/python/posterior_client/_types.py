"""What the server says about an answer, as frozen values. Entropies are in nats; C answers, K particles."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

PredictiveName = Literal["mixture", "linearized", "map"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probable:
    """The posterior predictive probability of an answer, and how far the weights leave it open.

    `variance` and `std` are those of p(answer | weights) under the posterior; `interval` is its
    central credible interval at the requested coverage. A calibrated `probability` moves none of the three;
    `uncalibrated` then is the posterior predictive probability itself.
    """

    probability: float
    variance: float
    std: float
    interval: tuple[float, float]
    uncalibrated: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Probable):
    """One candidate answer."""

    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entropy:
    """Entropy of the predictive in nats: total = aleatoric + epistemic (mutual information with the weights)."""

    total: float
    aleatoric: float
    epistemic: float

    @property
    def epistemic_share(self) -> float:
        """epistemic / total, in [0, 1]: the part of the doubt that more training data could remove."""
        return self.epistemic / self.total if self.total > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Variance:
    """Variance of the chosen answer's indicator: total = p (1 - p), of which `epistemic` is due to the weights."""

    epistemic: float
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncertainty:
    """What every answer of a posterior carries; alone, it is text by the MAP, without a distribution.

    `posterior` is name@hash, None for the base model. `calibrated` is true only when a calibration record
    matches the request. `label` is "requested" where the server asks for the outcome of this answer.
    """

    posterior: str | None
    predictive: PredictiveName
    calibrated: bool
    calibration: Mapping[str, Any] | None = None
    label: Literal["requested"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """The particles that `particles="auto"` did not use, and what the stop was decided by: estimates of the total
    variation from all particles and of the probability of another answer. After a stop they are too low."""

    particles: int
    total_variation: float
    other_answer: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictive(Uncertainty):
    """The posterior predictive over C answers.

    `per_particle` [K, C] is there when asked for; `mc_error` is the Monte-Carlo standard error of `confidence`;
    `familiarity` is the share of held-out rows that are at least as strange, where the server has such rows.
    Calibrated, the answer, `confidence`, `logprob` and the probabilities come from the calibration, all else from the
    posterior itself.
    """

    confidence: float
    logprob: float
    entropy: Entropy
    variance: Variance
    particles: int
    effective_particles: float
    mc_error: float
    familiarity: float | None = None
    left_out: LeftOut | None = None
    chosen_by: Literal["request", "held-out rows", "default"] | None = None
    per_particle: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction(Predictive):
    """The posterior predictive over candidate answers.

    `answers` [C] are in the order asked; `covariance` [C, C] is that of p(answer | weights). `prediction_set`, where
    there is a calibration, holds the true answer at the requested coverage.
    """

    answer: str
    answers: tuple[Answer, ...]
    covariance: tuple[tuple[float, ...], ...]
    prediction_set: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Particles:
    """By particle [K]: its log-probability of the token or text, and its weight before the token or after the text."""

    logprob: tuple[float, ...]
    weight: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a text: log-probability under the mixture, entropies of its distribution over the whole vocabulary.

    `epistemic_variance` is that of the token's probability over the particles.
    """

    logprob: float
    entropy: Entropy
    epistemic_variance: float
    effective_particles: float
    per_particle: Particles | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart(Uncertainty):
    """Text under the mixture; alone, a chunk of a stream: the tokens since the chunk before."""

    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, kw_only=True)  # no slots: `Text` has two parents, of which only one may have them
class TextSummary:
    """A whole text of T tokens: logprob = log p(text) = expected_logprob + information, information >= 0 nats.

    `expected_logprob` is the weighted mean of the particles' own log-probabilities, `entropy` sums over the tokens,
    `mean_token_probability` is exp(logprob / T), `mc_error` the Monte-Carlo standard error of `logprob`.
    """

    mean_token_probability: float
    logprob: float
    expected_logprob: float
    information: float
    entropy: Entropy
    effective_particles: float
    mc_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What some of the samples of a text mean; `text` is the most probable one of these.

    `interval` and `variance` are of the meaning's probability over the posterior, `standard_error` is that of
    `probability` for so few samples.
    """

    text: str
    probability: float
    interval: tuple[float, float]
    variance: float
    standard_error: float
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherMeanings:
    """The less probable meanings, which are not listed."""

    meanings: int
    samples: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Semantic:
    """What the `samples` of a text mean, the most probable meaning first.

    `own` is the number of the returned text's meaning, None where no sample has it; `truncated` samples were cut by
    `max_tokens`. `effective_particles` are those of the posterior as the samples weigh it.
    """

    samples: int
    truncated: int
    meaning: str
    returned: Literal["meaning", "greedy"]
    own: int | None
    entropy: Entropy
    effective_particles: float
    meanings: tuple[Meaning, ...]
    others: OtherMeanings | None = None


Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A value that the schema lists. `interval` and `variance` are of its probability over the posterior."""

    value: Scalar
    probability: float
    interval: tuple[float, float]
    variance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A value of a text that is JSON, at the JSON pointer `path`, given the text before it.

    `alternatives` are the values that the schema lists. They are None where it lists none, or where they were not
    scored. Then all numbers are of the value's own tokens, as in a `TextSummary`, and only then `expected_logprob`,
    `information` and `mc_error` are there.
    """

    path: str
    value: Scalar
    tokens: int
    probability: float
    interval: tuple[float, float]
    variance: float
    certainty: float
    logprob: float
    entropy: Entropy
    effective_particles: float
    expected_logprob: float | None = None
    information: float | None = None
    mc_error: float | None = None
    alternatives: tuple[Alternative, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(TextPart, TextSummary):
    """A text that K particles wrote, or read; `prompt` when the request had it scored, by `echo` with `logprobs`;
    `semantic` when it had `samples`; `fields` when it asked for those of its JSON.

    `confidence` is the probability that the text is right, None where no calibration tells. Where the request had a
    `max_risk`, `abstain` says whether the text is too unsure for it, and `reason` why.
    """

    mixing: Literal["sequence", "token"]
    particles: int
    confidence: float | None = None
    abstain: bool | None = None
    reason: Literal["ambiguous", "unfamiliar"] | None = None
    semantic: Semantic | None = None
    fields: tuple[Field, ...] | None = None
    prompt: TextSummary | None = None
    per_particle: Particles | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredText(Text):
    """A text that was given, and how probable it is."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Response:
    id: str
    created: int
    model: str
    posterior: str | None
    predictive: PredictiveName
    particles: int
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictiveResponse(_Response):
    """Answer of `POST /v1/predictive`: one `Prediction` for each input, in order. `created` is Unix seconds."""

    data: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTexts(_Response):
    """Answer of `POST /v1/predictive` with `texts`: one `ScoredText` for each, in order. `created` is Unix seconds."""

    data: tuple[ScoredText, ...]
