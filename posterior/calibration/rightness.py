"""P(right): how probable it is that a text answers its prompt rightly, learnt from graded answers.

How likely a text is says little about whether it is true: a long right answer is unlikely, a short wrong one is not. A
logistic regression on a few features of the text under the posterior (and, where it was sampled, of its meanings)
learns the probability from held-out answers that somebody or something has graded. Records lie beside those of choices
as calibration/text-<predictive>-<particles>-<text>[-<samples>-<meaning>]-<dtype>.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from posterior.calibration import signed
from posterior.calibration.conformal import MIN_ROWS
from posterior.calibration.drift import Reference
from posterior.calibration.metrics import RIGHT_METRICS, Estimate, estimate
from posterior.calibration.records import FOLDER, TEXT, Collected
from posterior.calibration.risk import Risk
from posterior.calibration.scalers import FLOOR, Part
from posterior.calibration.signed import AGAIN
from posterior.errors import PosteriorError
from posterior.models.devices import Dtype
from posterior.predictive.decoding import TextPredictive
from posterior.predictive.meanings import Meanings

FOLDS = 5  # of the cross-fitting; there are as many right and wrong answers at least
STRANGE = 0.05  # of held-out answers, at most, have an epistemic part like one that is called unfamiliar

TextKind = Literal["greedy", "meaning", "given"]
Feature = Literal[
    "mean_logprob", "logprob", "information", "entropy", "epistemic", "length",
    "semantic_entropy", "semantic_epistemic", "largest_meaning", "own_meaning",
]  # fmt: skip
PLAIN: tuple[Feature, ...] = ("mean_logprob", "logprob", "information", "entropy", "epistemic", "length")
SAMPLED: tuple[Feature, ...] = (
    *PLAIN, "semantic_entropy", "semantic_epistemic", "largest_meaning", "own_meaning",
)  # fmt: skip
Features = Mapping[Feature, float]


def features(text: TextPredictive, meanings: Meanings | None = None, own: int | None = None) -> dict[Feature, float]:
    """Of a text of at least one token; with `meanings`, also those of its samples.

    mean_logprob, logprob: log p(y|x, D), a token and whole; information: what the text tells about the weights;
    entropy: the tokens' mean entropy, epistemic: their mean mutual information with the weights; length: log T.
    semantic_entropy and semantic_epistemic: of the meanings; largest_meaning, own_meaning: the probability of the most
    probable meaning, and of the text's own (`own`; None: no sample has it). All in nats but the last two.
    """
    total, tokens = float(text.logprob.sum()), len(text.logprob)
    found: dict[Feature, float] = {
        "mean_logprob": total / tokens,
        "logprob": total,
        "information": text.information,
        "entropy": float(text.total.mean()),
        "epistemic": float(text.epistemic.mean()),
        "length": math.log(tokens),
    }
    if meanings is not None:
        p = meanings.predictive
        found["semantic_entropy"] = p.total
        found["semantic_epistemic"] = p.epistemic
        found["largest_meaning"] = float(p.probability[0])
        found["own_meaning"] = 0.0 if own is None else float(p.probability[own])
    return found


class Model(Part):
    """P(right) = sigmoid(intercept + sum_f weight_f (x_f - center_f) / scale_f)."""

    features: Annotated[tuple[Feature, ...], Field(min_length=1)]
    center: tuple[float, ...]
    scale: tuple[Annotated[float, Field(gt=0.0)], ...]
    weight: tuple[float, ...]
    intercept: float

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if not len(self.features) == len(self.center) == len(self.scale) == len(self.weight):
            raise ValueError("features, center, scale and weight have different lengths")
        return self

    @classmethod
    def fit(cls, names: Sequence[Feature], x: Tensor, right: Tensor) -> Self:
        """Of features [N, F] and right [N], with both true and false among them: maximum a posteriori with a standard
        normal prior on the weights of standardised features."""
        from sklearn.linear_model import LogisticRegression

        center, spread = x.mean(0), x.std(0, correction=0)
        scale = torch.where(spread > 1e-9, spread, 1.0)
        found = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(((x - center) / scale).numpy(), right.numpy())
        return cls(
            features=tuple(names),
            center=tuple(center.tolist()),
            scale=tuple(scale.tolist()),
            weight=tuple(np.ravel(found.coef_).tolist()),
            intercept=float(found.intercept_[0]),
        )

    def table(self, rows: Sequence[Features]) -> Tensor:
        """The features [N, F] of texts."""
        return torch.tensor([[row[name] for name in self.features] for row in rows], dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        """P(right) [N] of features [N, F]."""
        center, scale, weight = (
            torch.tensor(each, dtype=torch.float64) for each in (self.center, self.scale, self.weight)
        )
        return torch.sigmoid((x - center) / scale @ weight + self.intercept)


class TextKey(Part):
    """What a record belongs to. text: how its answers came about: "greedy" at temperature 0, "meaning" as the sample
    that stands for the most probable meaning, "given" by others. samples, meaning: how many were drawn for each prompt
    and what told their meanings apart, with a digest of its model if it has one; None without."""

    base: str
    posterior: str
    predictive: Literal["mixture", "map"]
    particles: int
    dtype: Dtype
    text: TextKind
    samples: int | None = None
    meaning: str | None = None

    @property
    def file_name(self) -> str:
        parts = (self.predictive, self.particles, self.text, self.samples, self.meaning, self.dtype)
        return TEXT + "-".join(str(part) for part in parts if part is not None) + ".json"


class TextRecord(Part):
    """One calibration. n answers with the hash `data`, graded as `grading` says; max_tokens: the most that were
    written, None of given ones. strange: the epistemic part (see `epistemic`) that STRANGE of them have at most.
    guard, risk: a model of half of the answers and, by it, the other half, which proves thresholds: nothing has
    chosen what it says of them. before: metrics of the tokens' mean probability, after: of P(right), cross-fitted.
    reference and collected: as of a `Record`."""

    format: Literal[1] = 1
    key: TextKey
    model: Model
    strange: float
    guard: Model
    risk: Risk
    n: Annotated[int, Field(ge=MIN_ROWS)]
    data: str
    grading: str
    max_tokens: int | None = None
    before: dict[str, Estimate]
    after: dict[str, Estimate]
    reference: Reference | None = None
    collected: Collected | None = None

    def confidence(self, text: Features) -> float:
        """The probability that the text is right."""
        return float(self.model(self.model.table([text])))

    def answered(self, text: Features, threshold: float) -> bool:
        """Whether the text is sure enough for a threshold of `risk`."""
        return float(self.guard(self.guard.table([text]))) >= threshold

    def unfamiliar(self, text: Features) -> bool:
        """Whether the weights leave the text more open than all but STRANGE of the held-out ones."""
        return epistemic(text) > self.strange

    def summary(self) -> dict[str, Any]:
        """What an answer says of it."""
        return {
            "method": "logistic",
            "n": self.n,
            "features": list(self.model.features),
            "grading": self.grading,
            "data": self.data,
            "key": self.key.model_dump(),
        }


def epistemic(text: Features) -> float:
    """The part of the doubt that comes from not knowing the weights, in nats: of the meaning, where there are samples,
    else of a token."""
    return text.get("semantic_epistemic", text["epistemic"])


class Graded(NamedTuple):
    """Answers that were graded: features, and which are right."""

    features: Sequence[Features]
    right: Sequence[bool]


def measure(
    graded: Graded,
    *,
    key: TextKey,
    data: str,
    grading: str,
    max_tokens: int | None = None,
    seed: int = 0,
    missing: Sequence[Features] = (),
    collected: Collected | None = None,
) -> TextRecord:
    """Fit on all answers, and say by cross-fitting what it is worth. `missing`: answers whose grades were asked for and
    never came; what is promised counts them as wrong. Raises PosteriorError for answers that are too few, or all right
    or all wrong."""
    from sklearn.model_selection import StratifiedKFold

    names = SAMPLED if key.samples is not None else PLAIN
    right = torch.tensor(list(graded.right), dtype=torch.bool)
    _check(right)
    x = torch.tensor([[row[name] for name in names] for row in graded.features], dtype=torch.float64)
    after = torch.zeros(len(x), dtype=torch.float64)
    for others, fold in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(x, right):
        after[fold] = Model.fit(names, x[others], right[others])(x[fold])
    own, held = halves(right, seed)
    guard = Model.fit(names, x[own], right[own])
    before = x[:, names.index("mean_logprob")].exp()
    doubt = torch.tensor([epistemic(row) for row in graded.features], dtype=torch.float64)
    return TextRecord(
        key=key,
        model=Model.fit(names, x, right),
        strange=float(doubt.quantile(1 - STRANGE, interpolation="higher")),
        guard=guard,
        risk=Risk.of(guard(x[held]), right[held], missing=guard(guard.table(missing)) if missing else None),
        n=len(x) + len(missing),
        data=data,
        grading=grading,
        max_tokens=max_tokens,
        before=_estimates(before, right),
        after=_estimates(after, right),
        reference=Reference.of(before.tolist(), x[:, names.index("entropy")].tolist()),
        collected=collected,
    )


def halves(right: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of two random halves, the first with both right and wrong answers, of which there must be some."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(right), generator=generator)
        own, held = order[: len(right) // 2], order[len(right) // 2 :]
        if bool(right[own].any()) and not bool(right[own].all()):
            return own, held


def check_count(answers: int) -> None:
    """Raises PosteriorError for too few answers to calibrate with."""
    if answers < MIN_ROWS:
        raise PosteriorError(f"{answers} graded answers are too few to calibrate with; give at least {MIN_ROWS}")


def _check(right: Tensor) -> None:
    """Raises PosteriorError for answers that cannot calibrate."""
    count, good = len(right), int(right.sum())
    check_count(count)
    fewer = min(good, count - good)
    if fewer < FOLDS:
        kind = "right" if good < FOLDS else "wrong"
        raise PosteriorError(
            f"{fewer} of the {count} graded answers are {kind}; a calibration needs at least {FOLDS} right and {FOLDS} "
            "wrong ones: give more rows, or grade in another way"
        )


def _estimates(confidence: Tensor, right: Tensor) -> dict[str, Estimate]:
    found = estimate(confidence.clamp(FLOOR, 1 - FLOOR), right, metrics=RIGHT_METRICS)
    return {name: each for name, each in found.items() if not math.isnan(each.value)}


def find(made: Mapping[TextKey, TextRecord], key: TextKey) -> TextRecord | None:
    """The record of texts with this key: with their samples, where it is of as many; else of the texts alone; else of
    answers that were given to be graded."""
    own = key.model_copy(update={"samples": None, "meaning": None})
    given = own.model_copy(update={"text": "given"})
    return next((found for each in (key, own, given) if (found := made.get(each)) is not None), None)


def save(folder: Path, made: TextRecord) -> Path:
    """Write a record into a posterior folder, atomically, in place of one with the same key. Raises PosteriorError."""
    return signed.write(folder / FOLDER / made.key.file_name, made.model_dump(mode="json"))


def load(folder: Path, *, base: str, posterior: str) -> dict[TextKey, TextRecord]:
    """The records of a posterior folder, verified. Raises PosteriorError with one clear line for the first bad one."""
    found = {}
    for path in sorted((folder / FOLDER).glob(f"{TEXT}*.json")):
        one = signed.parsed(TextRecord, signed.read(path), path)
        if (one.key.base, one.key.posterior) != (base, posterior) or path.name != one.key.file_name:
            raise PosteriorError(f"{path} calibrates another posterior or predictive; {AGAIN}")
        found[one.key] = one
    return found
