"""How familiar a question is: whether held-out questions lie as far from their own kind as this one does.

The measure is the Mahalanobis distance of the prompt's last hidden state to those of held-out rows, one mean for each
question that these were asked and one covariance for all (Lee et al. 2018, arXiv 1807.03888), shrunk as Ledoit & Wolf
(2004) do. `benchmarks/familiarity.py` compares it with others: the spread of the posterior's scores does not tell a
strange question, as it is small wherever the answer is sure.

`familiarity` is the share of held-out rows near the same mean that lie at least as far, a conformal p-value (Vovk et
al. 2005): of inputs like those rows, about a share a has a familiarity of a or less, whatever they are asked. Held-out
rows are measured by cross-fitting, so that none is near merely because it made the mean.

calibration/familiarity-<adapter>-<dtype>.safetensors holds it: `posterior calibrate` writes it beside the records.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from posterior.calibration.records import FOLDER, PredictiveName, template_hash
from posterior.calibration.scalers import Part
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.files import atomic
from posterior.files.tensors import save_file
from posterior.models.devices import Dtype

FOLDS = 5
FEW = 20  # rows of one question; the rows of questions that have fewer share a mean
RANK = 128  # directions whose variance is kept; the others have one in common

AdapterName = Literal["map", "particle"]  # theta*, or the first particle of a mixture: whose states are compared
Key = tuple[AdapterName, Dtype]


def adapter_of(predictive: PredictiveName) -> AdapterName:
    """Whose states tell how familiar a question is that is asked with this predictive."""
    return "particle" if predictive == "mixture" else "map"


class About(Part):
    """What the states are of. n rows with the hash `data`; dtype: of the base they were computed with."""

    format: Literal[1] = 1
    base: str
    posterior: str
    template: str
    adapter: AdapterName
    dtype: Dtype
    n: Annotated[int, Field(ge=1)]
    data: str

    @property
    def key(self) -> Key:
        return self.adapter, self.dtype

    @property
    def file_name(self) -> str:
        return f"familiarity-{self.adapter}-{self.dtype}.safetensors"


@dataclass(frozen=True)
class Center:
    """mean [G, D] of each question's states; the covariance is basis^T diag(variance - rest) basis + rest I, basis
    [R, D] orthonormal."""

    mean: Tensor
    basis: Tensor
    variance: Tensor
    rest: Tensor  # [1]

    @classmethod
    def fit(cls, states: Tensor, groups: Tensor) -> Self:
        """Of states [N, D] (float64) of the questions 0 .. G - 1 in groups [N]."""
        from sklearn.covariance import ledoit_wolf_shrinkage

        count = int(groups.max()) + 1
        member = torch.nn.functional.one_hot(groups, count).to(states)
        mean = (member.T @ states) / member.sum(0)[:, None]
        centred = states - mean[groups]
        shrinkage = float(ledoit_wolf_shrinkage(centred.numpy(), assume_centered=True))
        size = states.shape[1]
        values = torch.linalg.svd(centred, full_matrices=False)
        variance = values.S.square() / len(states)
        floor = shrinkage * float(variance.sum()) / size
        kept = min(RANK, len(variance), size - 1)
        left_out = variance[kept:].sum() / (size - kept)
        return cls(
            mean,
            values.Vh[:kept].contiguous(),
            (1 - shrinkage) * variance[:kept] + floor,
            ((1 - shrinkage) * left_out + floor)[None],
        )

    def nearest(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The distance [N] of states [N, D] to the nearest mean, and which it is [N]."""
        centred = states.double()[:, None] - self.mean.double()
        along = centred @ self.basis.double().T
        outside = (centred.square().sum(2) - along.square().sum(2)).clamp(min=0)
        square: Tensor = (along.square() / self.variance.double()).sum(2) + outside / self.rest.double()
        found = square.min(1)
        return found.values.sqrt(), found.indices


@dataclass(frozen=True)
class Familiarity:
    """Held-out rows to compare questions with: their center, their own distances [N], and which mean is nearest [N]."""

    center: Center
    held: Tensor
    group: Tensor

    @classmethod
    def fit(cls, states: Tensor, questions: Sequence[str]) -> Self:
        """Of the states [N, D] of held-out rows, and what each was asked."""
        from sklearn.model_selection import KFold

        states = states.double()
        groups = grouped(questions)
        held, near = torch.zeros(len(states), dtype=torch.float64), torch.zeros_like(groups)
        for others, fold in KFold(FOLDS, shuffle=True, random_state=0).split(np.arange(len(states))):
            known, own = torch.unique(groups[others], return_inverse=True)
            held[fold], nearest = Center.fit(states[others], own).nearest(states[fold])
            near[fold] = known[nearest]
        return cls(Center.fit(states, groups), held, near)

    def __call__(self, states: Tensor) -> list[float]:
        """The familiarity, in (0, 1], of each of the states [N, D]. Raises ValueError for those of another model."""
        if states.shape[1:] != self.center.mean.shape[1:] or not bool(states.isfinite().all()):
            raise ValueError(f"states {list(states.shape)} are not finite ones of {self.center.mean.shape[1]} numbers")
        distance, nearest = self.center.nearest(states)
        like = self.group == nearest[:, None]
        farther = (like & (self.held >= distance[:, None])).sum(1)
        return ((farther + 1).double() / (like.sum(1) + 1)).tolist()

    def of_held(self) -> list[float]:
        """That of each held-out row, among those near the same mean."""
        found = torch.zeros(len(self.held), dtype=torch.float64)
        for group in self.group.unique():  # type: ignore[no-untyped-call]
            own = self.group == group
            order = self.held[own].sort().values
            found[own] = (len(order) - torch.searchsorted(order, self.held[own])).double() / len(order)
        return found.tolist()


def grouped(questions: Sequence[str]) -> Tensor:
    """The number [N] of each row's question; those of questions with fewer than FEW rows have one in common."""
    counts: dict[str, int] = {}
    for question in questions:
        counts[question] = counts.get(question, 0) + 1
    names = {question: question if count >= FEW else None for question, count in counts.items()}
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names.values()))}
    return torch.tensor([numbers[names[question]] for question in questions])


def save(folder: Path, about: About, made: Familiarity) -> Path:
    """Write it into a posterior folder, atomically. Raises PosteriorError."""
    path = folder / FOLDER / about.file_name
    found = {**vars(made.center), "held": made.held, "group": made.group}
    tensors = {name: value.float().contiguous() for name, value in found.items()}
    text = about.model_dump_json()
    atomic.write(path, partial(save_file, tensors, metadata={"about": text, "hash": _digest(text, tensors)}))
    return path


def load(folder: Path, *, base: str, posterior: str, task: Task) -> dict[Key, Familiarity]:
    """Those of a posterior folder, verified. Raises PosteriorError with one clear line for the first bad one."""
    found: dict[Key, Familiarity] = {}
    for path in sorted((folder / FOLDER).glob("familiarity-*.safetensors")):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise PosteriorError(f"{path} leads outside the folder; refused")
        about, tensors = _read(path)
        own = {"base": base, "posterior": posterior, "template": template_hash(task)}
        if about != about.model_copy(update=own) or path.name != about.file_name:
            raise PosteriorError(f"{path} is of another posterior; {_AGAIN}")
        held, group = tensors.pop("held").double(), tensors.pop("group").long()
        found[about.key] = Familiarity(Center(**tensors), held, group)
    return found


def is_familiarity(path: Path) -> bool:
    """Whether a path inside a posterior folder is one of these files'."""
    return len(path.parts) == 2 and path.parts[0] == FOLDER and bool(_FILE_NAME.fullmatch(path.name))


_FILE_NAME = re.compile(rf"familiarity-({'|'.join(get_args(AdapterName))})-({'|'.join(get_args(Dtype))})\.safetensors")
_AGAIN = "delete it, or run `posterior calibrate` again"
_TENSORS = {"mean": 2, "basis": 2, "variance": 1, "rest": 1, "held": 1, "group": 1}  # with their dimensions


def _read(path: Path) -> tuple[About, dict[str, Tensor]]:
    """What a file says it is, and its tensors."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = About.model_validate_json(metadata["about"])
    except (KeyError, ValidationError, OSError, SafetensorError):
        raise PosteriorError(f"{path} is not what `posterior calibrate` wrote; {_AGAIN}") from None
    if metadata.get("hash") != _digest(metadata["about"], tensors) or not _fit_together(tensors):
        raise PosteriorError(f"{path} is not what `posterior calibrate` wrote (its hash differs); {_AGAIN}")
    return about, tensors


def _fit_together(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are all there, finite, and of one size."""
    if {name: value.dim() for name, value in tensors.items()} != _TENSORS:
        return False
    mean, basis, variance, rest, held, group = (tensors[name] for name in _TENSORS)
    return (
        all(bool(value.isfinite().all()) and value.numel() > 0 for value in tensors.values())
        and bool((variance > 0).all() and (rest > 0).all())
        and (basis.shape, len(rest)) == ((len(variance), mean.shape[1]), 1)
        and held.shape == group.shape
    )


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the text and every tensor, in the order of their names."""
    found = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        found.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode() + value.numpy().tobytes())
    return "sha256:" + found.hexdigest()
