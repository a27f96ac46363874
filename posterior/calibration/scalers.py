"""Calibrators of a choice's predictive: they map probabilities p [..., C] to calibrated ones.

`fit` takes probabilities [N, C] and labels [N], `apply` probabilities [..., C]. All float64. Rows of fewer options than
C have p = 0 behind their own in `fit`; `apply` takes rows with their own options alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from posterior.calibration.metrics import best_temperature

MAX_NUMBERS = 4096  # scores or knots a record keeps; more would sharpen nothing one could see
FLOOR = 1e-12  # of a probability before its logarithm
HOTTEST = 1e6  # the largest temperature that lowers a confidence
STEPS = 50  # of Newton's method, at most: mostly under ten, a few more where p is nearly certain

Method = Literal["none", "temperature", "vector", "isotonic", "platt"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Plain(Part):
    """p as it is: the rows have shown that nothing makes it better."""

    method: Literal["none"] = "none"

    @classmethod
    def fit(cls, _p: Tensor, _y: Tensor) -> Self:
        return cls()

    def apply(self, p: Tensor) -> Tensor:
        return p


class Temperature(Part):
    """softmax(log p / T), T > 0 of least NLL (Guo et al. 2017): the order of the answers stays."""

    method: Literal["temperature"] = "temperature"
    temperature: Annotated[float, Field(gt=0.0)]

    @classmethod
    def fit(cls, p: Tensor, y: Tensor) -> Self:
        log_p = _log(p)
        truth = torch.nn.functional.one_hot(y, p.shape[1]).bool()
        options = log_p.where((p > 0) | truth, -torch.inf)  # a true answer is one, however small its p
        return cls(temperature=best_temperature(options, y))

    def apply(self, p: Tensor) -> Tensor:
        return (_log(p) / self.temperature).softmax(-1)


class Vector(Part):
    """softmax(scale * log p + bias), one of each for every answer (Guo et al. 2017).

    Both have a standard normal prior around the identity, scale 1 and bias 0: few rows move them little, and an answer
    that no row has does not get probability 0.
    """

    method: Literal["vector"] = "vector"
    scale: tuple[float, ...]
    bias: tuple[float, ...]

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if len(self.scale) != len(self.bias):
            raise ValueError("scale and bias have different lengths")
        return self

    @classmethod
    def fit(cls, p: Tensor, y: Tensor) -> Self:
        from scipy.optimize import minimize
        from scipy.special import log_softmax

        log_p, n, c = _log(p).numpy(), *p.shape
        truth = np.eye(c)[y.numpy()]

        def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
            scale, bias = np.split(parameters, 2)
            log_q = log_softmax(scale * log_p + bias, axis=1)
            residual = np.exp(log_q) - truth
            gradient = np.concatenate([(residual * log_p).sum(0) + scale - 1, residual.sum(0) + bias])
            prior = (np.square(scale - 1).sum() + np.square(bias).sum()) / 2
            return (prior - (truth * log_q).sum()) / n, gradient / n

        found = minimize(loss, np.repeat([1.0, 0.0], c), jac=True, method="L-BFGS-B")
        scale, bias = np.split(found.x, 2)
        return cls(scale=tuple(scale.tolist()), bias=tuple(bias.tolist()))

    def apply(self, p: Tensor) -> Tensor:
        return (_log(p) * torch.tensor(self.scale).to(p) + torch.tensor(self.bias).to(p)).softmax(-1)


class Isotonic(Part):
    """P(top answer is true), a non-decreasing function of its probability (Zadrozny & Elkan 2002), linear between its
    knots.

    It stays 1 / (n + 2) away from 0 and 1, because n rows prove no certainty. The other answers share the rest (see
    `_with_confidence`).
    """

    method: Literal["isotonic"] = "isotonic"
    confidence: Annotated[tuple[Share, ...], Field(min_length=1, max_length=MAX_NUMBERS)]
    probability: Annotated[tuple[Share, ...], Field(min_length=1, max_length=MAX_NUMBERS)]

    @model_validator(mode="after")
    def _monotone(self) -> Self:
        if len(self.confidence) != len(self.probability):
            raise ValueError("confidence and probability have different lengths")
        if not (ascending(self.confidence) and ascending(self.probability)):
            raise ValueError("the knots are not in ascending order")
        return self

    @classmethod
    def fit(cls, p: Tensor, y: Tensor) -> Self:
        from sklearn.isotonic import IsotonicRegression

        confidence, right = _top(p, y)
        edge = 1 / (len(y) + 2)
        found = IsotonicRegression(y_min=edge, y_max=1 - edge).fit(confidence, right)
        x, q = found.X_thresholds_, found.y_thresholds_
        keep = np.linspace(0, len(x) - 1, min(len(x), MAX_NUMBERS)).astype(int)
        return cls(confidence=tuple(x[keep].tolist()), probability=tuple(q[keep].tolist()))

    def apply(self, p: Tensor) -> Tensor:
        confidence = np.interp(p.max(-1).values.numpy(), self.confidence, self.probability)
        return _with_confidence(p, torch.as_tensor(confidence))


class Platt(Part):
    """P(top answer is true) = sigmoid(slope * logit of its probability + intercept) (Platt 1999).

    Fitted to Platt's softened labels, which keep it finite when every answer is right. The other answers share the
    rest (see `_with_confidence`).
    """

    method: Literal["platt"] = "platt"
    slope: float
    intercept: float

    @classmethod
    def fit(cls, p: Tensor, y: Tensor) -> Self:
        from sklearn.linear_model import LogisticRegression

        confidence, right = _top(p, y)
        true, n = right.sum(), len(right)
        target = np.where(right > 0, (true + 1) / (true + 2), 1 / (n - true + 2))
        logit = _logit(torch.as_tensor(confidence)).numpy()
        found = LogisticRegression(C=np.inf, tol=1e-8).fit(  # each row once as right and once as wrong, by its target
            np.tile(logit, 2)[:, None], np.repeat([1, 0], n), sample_weight=np.concatenate([target, 1 - target])
        )
        return cls(slope=float(found.coef_[0, 0]), intercept=float(found.intercept_[0]))

    def apply(self, p: Tensor) -> Tensor:
        return _with_confidence(p, torch.sigmoid(self.slope * _logit(p.max(-1).values) + self.intercept))


Calibrator = Annotated[Plain | Temperature | Vector | Isotonic | Platt, Field(discriminator="method")]
CALIBRATORS: Mapping[Method, type[Plain | Temperature | Vector | Isotonic | Platt]] = {
    "none": Plain, "temperature": Temperature, "vector": Vector, "isotonic": Isotonic, "platt": Platt,
}  # fmt: skip


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=FLOOR).log()


def _logit(p: Tensor) -> Tensor:
    return p.clamp(FLOOR, 1 - FLOOR).logit()


def ascending(values: tuple[float, ...]) -> bool:
    return all(low <= high for low, high in pairwise(values))


def _top(p: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the top answer, and 1.0 where it is the true one: both [N]."""
    confidence, answer = p.max(-1)
    return confidence.numpy(), (answer == y).double().numpy()


def _with_confidence(p: Tensor, confidence: Tensor) -> Tensor:
    """p [..., C] with `confidence` [...] for its top answer.

    More than it had is taken from the others in proportion. For less, all get a temperature, each row its own: in
    proportion, a second answer would pass the first and be given with a confidence that nothing has calibrated. Hence
    of three answers or more the top one stays on top, with hardly less than 1 / C; of two, the other has the rest.
    """
    top, q = p.argmax(-1, keepdim=True), confidence[..., None]
    p = p.clamp(min=FLOOR)
    rest = p.scatter(-1, top, 0.0)
    sharper = (rest / rest.sum(-1, keepdim=True) * (1 - q)).scatter(-1, top, q)
    if p.shape[-1] == 2:
        return sharper
    below = p.log() - p.log().gather(-1, top)
    inverse = torch.zeros_like(q)  # of the temperature; log q is concave in it, so that no step of Newton's is too long
    for _ in range(STEPS):
        weight = (inverse * below).exp()
        total = weight.sum(-1, keepdim=True)
        slope = -(weight * below).sum(-1, keepdim=True) / total
        last, inverse = inverse, (inverse + (total * q).log() / slope.clamp(min=FLOOR)).clamp(1 / HOTTEST, 1.0)
        if torch.allclose(inverse, last, rtol=1e-12, atol=0.0):
            break
    return torch.where(q < p.gather(-1, top), (inverse * below).softmax(-1), sharper)
