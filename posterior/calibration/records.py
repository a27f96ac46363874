"""A calibration of a choice's predictive: probabilities that come true, and sets of answers that hold the true one.

A record belongs to one key: base, posterior, template, predictive, number of particles and dtype, and number of answers
where each row brings its own. Another key is another distribution. Records lie in
calibration/<predictive>-<particles>-<dtype>.json (or ...-<particles>-<answers>-<dtype>.json) beside posterior.json,
whose hash does not cover them. Records of format 1 had their dtype beside the key, and not in the file's name.

The calibrator maps the predictive's probabilities p [..., C] to calibrated ones. The sets are split-conformal (Vovk et
al. 2005; Lei et al. 2018), with scores of p itself and not of the calibrated probabilities: p saw none of the
calibration rows, so that all of them may serve both, and the guarantee is exact.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from posterior.calibration.metrics import COVERAGE, Estimate, best_temperature
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.files import atomic, objects
from posterior.models.devices import Dtype

# The fewest rows whose largest score bounds 95 % of all cases with 95 % confidence: the coverage of a conformal set at
# the largest of n scores is Beta(n, 1) distributed over calibration sets (Vovk 2012), and 0.95^n <= 0.05 from here on.
MIN_ROWS = 59
MAX_NUMBERS = 4096  # scores or knots a record keeps; more would sharpen nothing one could see
FLOOR = 1e-12  # of a probability before its logarithm
HOTTEST = 1e6  # the largest temperature that lowers a confidence
STEPS = 50  # of Newton's method, at most: mostly under ten, a few more where p is nearly certain

FOLDER = "calibration"
PredictiveName = Literal["mixture", "linearized", "map"]
Method = Literal["temperature", "vector", "isotonic", "platt"]
Score = Literal["lac", "aps"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Key(_Part):
    """What a calibration belongs to. `particles`: how many the predictive averages, as its answers say; `dtype`: of the
    base it is computed with; `answers`: how many each row brings itself, None where they are the task's."""

    base: str
    posterior: str
    template: str
    predictive: PredictiveName
    particles: int
    dtype: Dtype
    answers: int | None = None

    @property
    def file_name(self) -> str:
        return f"{self._stem}-{self.dtype}.json"

    @property
    def file_name_1(self) -> str:
        """That of format 1."""
        return f"{self._stem}.json"

    @property
    def _stem(self) -> str:
        return "-".join(str(part) for part in (self.predictive, self.particles, self.answers) if part is not None)


def template_hash(task: Task) -> str:
    """sha256 of everything that makes a prompt of a row: template, chat or not, and the answers that may follow."""
    return _digest(task.to_json())


# Calibrators: `fit` on probabilities [N, C] and labels [N], `apply` to probabilities [..., C]. All float64.


class Temperature(_Part):
    """softmax(log p / T), T > 0 of least NLL (Guo et al. 2017): the order of the answers stays."""

    method: Literal["temperature"] = "temperature"
    temperature: Annotated[float, Field(gt=0.0)]

    @classmethod
    def fit(cls, p: Tensor, y: Tensor) -> Self:
        return cls(temperature=best_temperature(_log(p), y))

    def apply(self, p: Tensor) -> Tensor:
        return (_log(p) / self.temperature).softmax(-1)


class Vector(_Part):
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


class Isotonic(_Part):
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
        if not (_ascending(self.confidence) and _ascending(self.probability)):
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


class Platt(_Part):
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


Calibrator = Annotated[Temperature | Vector | Isotonic | Platt, Field(discriminator="method")]
CALIBRATORS: Mapping[Method, type[Temperature | Vector | Isotonic | Platt]] = {
    "temperature": Temperature, "vector": Vector, "isotonic": Isotonic, "platt": Platt,
}  # fmt: skip


class Conformal(_Part):
    """Split-conformal prediction sets from the sorted scores of the true answers: any coverage can be asked for.

    lac: score 1 - p_y (Sadinle, Lei & Wasserman 2019), the smallest sets on average.
    aps: score = mass of the answers more probable than y (Romano, Sesia & Candès 2020, with U = 0 instead of a random
    one, so that the same request gets the same set): answers by probability until their mass passes the threshold.
    """

    score: Score
    scores: Annotated[tuple[Share, ...], Field(min_length=1, max_length=MAX_NUMBERS)]

    @model_validator(mode="after")
    def _sorted(self) -> Self:
        if not _ascending(self.scores):
            raise ValueError("the scores are not in ascending order")
        return self

    @classmethod
    def fit(cls, score: Score, p: Tensor, y: Tensor, seed: int = 0) -> Self:
        """Of more than MAX_NUMBERS rows a random part is kept: the guarantee is that part's own."""
        scores = _scores(score, p).gather(1, y[:, None])[:, 0]
        keep = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))[:MAX_NUMBERS]
        return cls(score=score, scores=tuple(scores[keep].clamp(0, 1).sort().values.tolist()))

    def threshold(self, coverage: float) -> float:
        """The ceil((n + 1) coverage)-th smallest of n scores; inf, every answer, where n rows cannot promise more."""
        rank = math.ceil((len(self.scores) + 1) * coverage - 1e-9)
        return self.scores[max(rank, 1) - 1] if rank <= len(self.scores) else math.inf

    def sets(self, p: Tensor, coverage: float) -> Tensor:
        """Which answers [..., C] are in the set: the true one with probability >= coverage over rows and calibration
        sets, as long as rows are exchangeable with the calibration's."""
        return _scores(self.score, p).clamp(0, 1) <= self.threshold(coverage)


class Record(_Part):
    """One calibration. n rows with the hash `data`; `before` and `after`: metrics of the calibration rows, `after` and
    `sets` (covered, size, at `coverage`) by cross-fitting."""

    format: Literal[2] = 2
    key: Key
    calibrator: Calibrator
    conformal: Conformal
    n: Annotated[int, Field(ge=MIN_ROWS)]
    data: str
    before: dict[str, Estimate]
    after: dict[str, Estimate]
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)]
    sets: dict[str, Estimate]

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if len(self.conformal.scores) != min(self.n, MAX_NUMBERS):
            raise ValueError(f"{len(self.conformal.scores)} conformal scores do not belong to {self.n} rows")
        return self

    def apply(self, p: Tensor) -> Tensor:
        """Calibrated probabilities [..., C] of the predictive's [..., C]."""
        return self.calibrator.apply(p.double())

    def prediction_set(self, p: Tensor, coverage: float) -> Tensor:
        """Which answers [..., C] are in the set at `coverage`; p [..., C] is the predictive's, not calibrated."""
        return prediction_set(self.calibrator, self.conformal, p.double(), coverage)

    def summary(self) -> dict[str, Any]:
        """What an answer says of it."""
        return {
            "method": self.calibrator.method,
            "n": self.n,
            "conformal": self.conformal.score,
            "data": self.data,
            "key": self.key.model_dump(),
        }


def prediction_set(calibrator: Calibrator, conformal: Conformal, p: Tensor, coverage: float) -> Tensor:
    """The conformal set [..., C] and the answer given, the calibrated most probable one: no set is empty."""
    given = calibrator.apply(p).argmax(-1, keepdim=True)
    return conformal.sets(p, coverage).scatter(-1, given, True)


# Records on disk


def sets(
    calibration_p: Tensor, calibration_y: Tensor, p: Tensor, y: Tensor, coverage: float = COVERAGE, score: Score = "lac"
) -> tuple[float, float]:
    """Share of the prediction sets that hold the true label, and their mean size: split-conformal at `coverage`, with
    the most probable answer always in, as they are served."""
    conformal = Conformal.fit(score, calibration_p, calibration_y)
    chosen = prediction_set(Temperature(temperature=1.0), conformal, p, coverage).double()
    return float(chosen.gather(1, y[:, None]).mean()), float(chosen.sum(1).mean())


def save(folder: Path, made: Record) -> Path:
    """Write a record into a posterior folder, atomically, in place of one with the same key. Raises PosteriorError."""
    path = folder / FOLDER / made.key.file_name
    content = made.model_dump(mode="json")
    text = json.dumps(content | {"hash": _digest(content)}, indent=1, allow_nan=False) + "\n"
    atomic.write(path, text.encode())
    return path


def load(folder: Path, *, base: str, posterior: str, task: Task) -> dict[Key, Record]:
    """The records of a posterior folder, verified. Raises PosteriorError with one clear line for the first bad one."""
    folder = folder.resolve()
    found: dict[Key, Record] = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        if not path.resolve().is_relative_to(folder):
            raise PosteriorError(f"{path} leads outside the folder; refused")
        one, earlier = _read(path)
        own = one.key.model_copy(
            update={
                "base": base,
                "posterior": posterior,
                "template": template_hash(task),
                "answers": None if task.answers else one.key.answers,
            }
        )
        calibrator = one.calibrator
        if one.key != own or path.name != (own.file_name_1 if earlier else own.file_name):
            raise PosteriorError(f"{path} calibrates another posterior or predictive; {_AGAIN}")
        if isinstance(calibrator, Vector) and len(calibrator.scale) != len(task.answers or ()):
            raise PosteriorError(
                f"{path} calibrates {len(calibrator.scale)} answers, the task has another number; {_AGAIN}"
            )
        found[own] = found.get(own, one) if earlier else one
    return found


def is_record(path: Path) -> bool:
    """Whether a path inside a posterior folder is a calibration record's, or was left by a writer of one."""
    if path.parts[:1] != (FOLDER,) or len(path.parts) != 2:
        return False
    return bool(_FILE_NAME.fullmatch(path.name)) or atomic.is_ours(path)


_FILE_NAME = re.compile(rf"({'|'.join(get_args(PredictiveName))})(-\d+)+(-({'|'.join(get_args(Dtype))}))?\.json")
_AGAIN = "delete it, or run `posterior calibrate` again"


def _read(path: Path) -> tuple[Record, bool]:
    """A record, and whether it is of format 1."""
    try:
        content = objects.read(path)
        if content.pop("hash", None) != _digest(content):
            raise PosteriorError(f"{path} is not what `posterior calibrate` wrote (its hash differs); {_AGAIN}")
        earlier = content.get("format") == 1 and isinstance(content.get("key"), dict)
        if earlier:
            content |= {"format": 2, "key": content["key"] | {"dtype": content.pop("dtype", None)}}
        return Record.model_validate_json(json.dumps(content)), earlier
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PosteriorError(f"{path} has an unreadable {where or 'record'}: {first['msg']}; {_AGAIN}") from None
    except (OSError, ValueError):
        raise PosteriorError(f"{path} is no readable JSON record; {_AGAIN}") from None


def _digest(content: Mapping[str, Any]) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


# Pieces


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=FLOOR).log()


def _logit(p: Tensor) -> Tensor:
    return p.clamp(FLOOR, 1 - FLOOR).logit()


def _ascending(values: tuple[float, ...]) -> bool:
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


def _scores(score: Score, p: Tensor) -> Tensor:
    """The conformal score [..., C] of every answer."""
    if score == "lac":
        return 1 - p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(p).scatter(-1, order, ordered.cumsum(-1) - ordered)
