"""Calibration records: what `posterior calibrate` writes and the server applies.

A record belongs to one key: base, posterior, template, predictive, number of particles and dtype, and number of answers
where each row brings its own. Another key is another distribution. Records lie in
calibration/<predictive>-<particles>-<dtype>.json (or ...-<particles>-<answers>-<dtype>.json) beside posterior.json,
whose hash does not cover them. Records of format 1 had their dtype beside the key, and not in the file's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator
from torch import Tensor

from posterior.calibration import scalers, signed
from posterior.calibration.conformal import MIN_ROWS, Conformal, prediction_set
from posterior.calibration.drift import Reference
from posterior.calibration.metrics import Estimate
from posterior.calibration.risk import Risk
from posterior.calibration.scalers import Calibrator, Part, Vector
from posterior.calibration.signed import AGAIN
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.files import atomic
from posterior.models.devices import Dtype

FOLDER = "calibration"
CHOICE = "served.json"  # which predictive was chosen (choice.py)
PROBES = "probes.json"  # what the posterior says of a few rows (probes.py)
TEXT = "text-"  # begins the name of a record of text (rightness.py)
PredictiveName = Literal["mixture", "linearized", "map"]
QuestionKind = Literal["predicate", "choice", "score", "any"]


class Key(Part):
    """What a calibration belongs to. `particles`: how many the predictive averages, as its answers say; `dtype`: of the
    base it is computed with; `answers`: how many each row brings itself, None where they are the task's, or where they
    differ; `question`: the kind of a decision's questions, "any" of all kinds together, None of another task."""

    base: str
    posterior: str
    template: str
    predictive: PredictiveName
    particles: int
    dtype: Dtype
    answers: int | None = None
    question: QuestionKind | None = None

    @property
    def file_name(self) -> str:
        return f"{self._stem}-{self.dtype}.json"

    @property
    def file_name_1(self) -> str:
        """That of format 1."""
        return f"{self._stem}.json"

    @property
    def _stem(self) -> str:
        parts = (self.predictive, self.particles, self.answers, self.question)
        return "-".join(str(part) for part in parts if part is not None)


def template_hash(task: Task) -> str:
    """sha256 of everything that makes a prompt of a row: template, chat or not, and the answers that may follow."""
    return signed.digest(task.to_json())


class Collected(Part):
    """That a record was made of outcomes. requested: labels that the server asked for, of which `missing` never came;
    until: Unix time, when they were collected; confidence_only: the guarantees stayed those of the record before."""

    requested: Annotated[int, Field(ge=0)]
    missing: Annotated[int, Field(ge=0)]
    until: float
    confidence_only: bool = False


class Record(Part):
    """One calibration. n rows with the hash `data`; `before` and `after`: metrics of the calibration rows, `after` and
    `sets` (covered, size, at `coverage`) by cross-fitting; risk: None of the method vector, which may give another
    answer than the predictive's, and of records that earlier versions wrote. reference: what the rows looked like, None
    of records that earlier versions wrote; collected: None where the rows were given."""

    format: Literal[2] = 2
    key: Key
    calibrator: Calibrator
    conformal: Conformal
    risk: Risk | None = None
    n: Annotated[int, Field(ge=MIN_ROWS)]
    data: str
    before: dict[str, Estimate]
    after: dict[str, Estimate]
    coverage: Annotated[float, Field(gt=0.0, lt=1.0)]
    sets: dict[str, Estimate]
    reference: Reference | None = None
    collected: Collected | None = None

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if len(self.conformal.scores) != min(self.n, scalers.MAX_NUMBERS):
            raise ValueError(f"{len(self.conformal.scores)} conformal scores do not belong to {self.n} rows")
        if self.risk is not None and len(self.risk.right) != len(self.conformal.scores):
            raise ValueError(f"{len(self.risk.right)} rows of risk do not belong to {self.n} rows")
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


def find(made: Mapping[Key, Record], key: Key) -> Record | None:
    """The calibration with this key; for a kind of question that has none of its own, that of all kinds."""
    own = made.get(key)
    return made.get(key.model_copy(update={"question": "any"})) if own is None and key.question else own


def save(folder: Path, made: Record) -> Path:
    """Write a record into a posterior folder, atomically, in place of one with the same key. Raises PosteriorError."""
    return signed.write(folder / FOLDER / made.key.file_name, made.model_dump(mode="json"))


def load(folder: Path, *, base: str, posterior: str, task: Task) -> dict[Key, Record]:
    """The records of a posterior folder, verified. Raises PosteriorError with one clear line for the first bad one."""
    folder = folder.resolve()
    found: dict[Key, Record] = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        if path.name in (CHOICE, PROBES) or path.name.startswith(TEXT):
            continue
        one, earlier = _read(path)
        own = one.key.model_copy(
            update={
                "base": base,
                "posterior": posterior,
                "template": template_hash(task),
                "answers": None if task.answers else one.key.answers,
                "question": (one.key.question or "any") if task.kind == "decision" else None,
            }
        )
        calibrator = one.calibrator
        if one.key != own or path.name != (own.file_name_1 if earlier else own.file_name):
            raise PosteriorError(f"{path} calibrates another posterior or predictive; {AGAIN}")
        if isinstance(calibrator, Vector) and len(calibrator.scale) != len(task.answers or ()):
            raise PosteriorError(
                f"{path} calibrates {len(calibrator.scale)} answers, the task has another number; {AGAIN}"
            )
        found[own] = found.get(own, one) if earlier else one
    return found


def is_record(path: Path) -> bool:
    """Whether a path inside a posterior folder is a calibration record's, or was left by a writer of one."""
    if path.parts[:1] != (FOLDER,) or len(path.parts) != 2:
        return False
    return (
        path.name in (CHOICE, PROBES) or any(name.fullmatch(path.name) for name in _FILE_NAMES) or atomic.is_ours(path)
    )


_FILE_NAMES = (
    re.compile(
        rf"({'|'.join(get_args(PredictiveName))})(-\d+)+(-({'|'.join(get_args(QuestionKind))}))?"
        rf"(-({'|'.join(get_args(Dtype))}))?\.json"
    ),
    re.compile(rf"{TEXT}[a-z0-9-]+\.json"),
)


def _read(path: Path) -> tuple[Record, bool]:
    """A record, and whether it is of format 1."""
    content = signed.read(path)
    earlier = content.get("format") == 1 and isinstance(content.get("key"), dict)
    if earlier:
        content |= {"format": 2, "key": content["key"] | {"dtype": content.pop("dtype", None)}}
    return signed.parsed(Record, content, path), earlier


# Pieces
