"""The posterior folder: what `fit` writes and `serve` loads. JSON and safetensors only; every adapter is an ordinary
PEFT folder.

    posterior.json        what it is and how it was made, and the sha256 of every file (posterior/storage/record.py)
    map/                  PEFT adapter theta*
    particles/000/ ...    PEFT adapters (family "particles")
    laplace.safetensors   curvature and prior precision of each matrix that is uncertain (family "laplace")
    full.safetensors      a sketch of the whole Fisher, unless the blocks are all that was wanted
    rows.safetensors      digests of the training rows, so that they are known again among test rows (not of an import)
    calibration/ ...      records of `posterior calibrate`, added later (posterior/calibration/records.py), which
                          predictive it chose (choice.py), what questions are familiar (familiarity.py), how
                          probably texts are right (rightness.py), and what a server must say of a few rows
                          (probes.py), which a fit writes too

`hash` names the distribution: neither how it was made nor calibrations change it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from posterior.calibration import choice, familiarity, probes, records, rightness
from posterior.calibration.choice import Choice
from posterior.calibration.familiarity import About, Familiarity
from posterior.calibration.probes import Probes
from posterior.calibration.records import Key, PredictiveName, Record
from posterior.calibration.rightness import TextKey, TextRecord
from posterior.curvature.kfac import Block
from posterior.curvature.sketch import Full
from posterior.data.examples import Example, digests
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.files import atomic
from posterior.files.tensors import save_file
from posterior.laplace import blockwise
from posterior.models import lora
from posterior.models.lora import Theta
from posterior.storage import draws, packing, record
from posterior.storage.destination import check_replaceable, destination
from posterior.storage.record import ROWS
from posterior.training.method import Family

FULL = "full.safetensors"
PREDICTIVES: Mapping[Family, tuple[PredictiveName, ...]] = {
    "laplace": ("linearized", "mixture", "map"),
    "particles": ("mixture", "map"),
}


@dataclass(frozen=True)
class Posterior:
    """A verified posterior folder. base: {"id", "revision", "hash"}; weights: one per particle; prior, fit: as
    recorded; width: of Laplace draws (posterior/laplace/width.py)."""

    path: Path
    hash: str
    family: Family
    base: dict[str, Any]
    task: Task
    lora: dict[str, Any]
    prior: dict[str, Any]
    fit: dict[str, Any]
    weights: tuple[float, ...]
    calibration: Mapping[Key, Record] = field(default_factory=dict, repr=False)
    choice: Choice | None = field(default=None, repr=False)
    familiarity: Mapping[familiarity.Key, Familiarity] = field(default_factory=dict, repr=False)
    texts: Mapping[TextKey, TextRecord] = field(default_factory=dict, repr=False)
    probes: Probes | None = field(default=None, repr=False)
    curvature: dict[str, Block] = field(default_factory=dict, repr=False)
    precision: dict[str, float] = field(default_factory=dict, repr=False)
    full: Full | None = field(default=None, repr=False)
    width: float = 1.0

    @property
    def covariance(self) -> blockwise.Covariance:
        """The covariance of family "laplace" that the linearised predictive uses."""
        return self.full or blockwise.Blocks(self.curvature, self.precision)

    @property
    def predictives(self) -> tuple[PredictiveName, ...]:
        """Those of candidate answers, the default first: what held-out rows chose, or else the one that was best over
        all sets measured (docs/results.md)."""
        found = PREDICTIVES[self.family]
        first = self.choice.predictive if self.choice else found[0]
        return (first, *(name for name in found if name != first))

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def map_dir(self) -> Path:
        return self.path / "map"

    @property
    def base_spec(self) -> str:
        """How to find the base: a hub id needs its revision, other names stand alone."""
        id, revision = str(self.base["id"]), self.base["revision"]
        return f"{id}@{revision}" if "/" in id and revision else id

    @property
    def sampler(self) -> str | None:
        """What draws the particles of family "laplace": another sampler, or another torch, draws others."""
        if self.family == "particles":
            return None
        return f"v{blockwise.SAMPLER}.torch{'.'.join(torch.__version__.split('.')[:2])}"

    @property
    def tells_rows(self) -> bool:
        """Whether the folder tells which rows the posterior was fitted on."""
        return (self.path / ROWS).is_file()

    def trained_on(self, examples: Sequence[Example]) -> int:
        """How many of the examples are rows of its fit; 0 for a folder that does not tell."""
        known = set(load_file(self.path / ROWS)["digest"].tolist()) if self.tells_rows else set()
        return sum(digest in known for digest in digests(examples).tolist())

    def check_base(self, base_hash: str) -> None:
        """Raises PosteriorError when the weights that were loaded are not the ones this posterior was fitted on."""
        if base_hash != self.base["hash"]:
            raise PosteriorError(
                f"posterior {self.name!r} was fitted on {self.base['id']} ({self.base['hash'][:19]}...), "
                f"but the loaded base has weights {base_hash[:19]}...; serve it with its own base or refit it"
            )

    def order(self, k: int) -> list[int]:
        """The numbers of k particles: the heaviest of the folder, heaviest first and of equal ones the first, or any of
        a Laplace posterior. Raises PosteriorError for none, and for more than the folder has."""
        if k < 1:
            raise PosteriorError(f"{k} particles asked for; at least 1 is needed")
        if self.family == "laplace":
            return list(range(k))
        if k > len(self.weights):
            raise PosteriorError(f"posterior {self.name!r} has {len(self.weights)} particles, {k} were asked for")
        return sorted(range(len(self.weights)), key=lambda index: -self.weights[index])[:k]

    def mixture(self, k: int) -> tuple[float, ...]:
        """The weights, which sum to 1, of the k particles that `thetas` and `adapters` give."""
        kept = [self.weights[index] if self.weights else 1.0 for index in self.order(k)]
        return tuple(weight / sum(kept) for weight in kept)

    def thetas(self, k: int, seed: int = 0) -> Iterator[Theta]:
        """k particles: the heaviest of the folder, or k Laplace draws."""
        mean, generator = lora.read_adapter(self.map_dir), torch.Generator().manual_seed(seed)
        for index in self.order(k):
            if self.family == "particles":
                yield lora.read_adapter(self._particle(index))
            else:
                yield blockwise.sample(self.curvature, self.precision, mean, generator, self.width)

    def adapters(self, k: int, cache: Path, seed: int = 0) -> list[Path]:
        """k particles as PEFT folders: the heaviest of the folder, or k Laplace draws from the cache.

        Raises PosteriorError as `order` does, and for a cache that cannot be used.
        """
        order = self.order(k)
        if self.family == "particles":
            return [self._particle(index) for index in order]

        def make(folder: Path) -> None:
            config = lora.read_config(self.map_dir)
            for index, theta in enumerate(self.thetas(k, seed)):
                lora.write_adapter(folder / f"{index:03d}", theta, config)

        key = f"{self.hash[:16]}-s{seed}-{self.sampler}"
        size = k * (self.map_dir / "adapter_model.safetensors").stat().st_size
        return draws.ensure(cache, key, k, size, make)

    def check_open(self) -> None:
        """Raises PosteriorError where no calibration record can be added."""
        inside = self.path / records.FOLDER
        for folder in (self.path.parent, inside if inside.is_dir() else self.path):  # the lock is beside the folder
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PosteriorError(
                    f"a calibration is written into {self.path}, but you may not write into {folder}; calibrate a copy"
                )

    def add(self, made: Record) -> Path:
        """Write a calibration record into the folder; returns where. Raises PosteriorError, also where the folder holds
        another posterior by now."""
        with self._unchanged():
            return records.save(self.path, made)

    def add_text(self, made: TextRecord) -> Path:
        """Write a calibration record of texts into the folder; returns where. Raises PosteriorError as `add`."""
        with self._unchanged():
            return rightness.save(self.path, made)

    def choose(self, made: Choice) -> Choice:
        """Write the choice of the default predictive into the folder. Raises PosteriorError as `add`."""
        with self._unchanged():
            choice.save(self.path, made)
        return made

    def compare_with(self, about: About, made: Familiarity) -> Path:
        """Write what questions are familiar into the folder; returns where. Raises PosteriorError as `add`."""
        with self._unchanged():
            return familiarity.save(self.path, about, made)

    def add_probes(self, made: Probes) -> Path:
        """Write what a server must say of a few rows into the folder; returns where. Raises PosteriorError as `add`."""
        with self._unchanged():
            return probes.save(self.path, made)

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Within, the folder is locked and holds this posterior. Raises PosteriorError."""
        try:
            with atomic.locked(self.path):
                if record.read(self.path).hash != self.hash:
                    raise PosteriorError(
                        f"{self.path} was replaced while its calibration was computed; calibrate again"
                    )
                yield
        except OSError as error:
            raise PosteriorError(f"cannot write into {self.path}: {error.strerror}; fix its permissions") from error

    def _particle(self, index: int) -> Path:
        return self.path / "particles" / f"{index:03d}"


def save(
    folder: Path,
    *,
    family: Family,
    base: Mapping[str, Any],
    task: Task,
    lora_config: Mapping[str, Any],
    prior: Mapping[str, Any],
    fit: Mapping[str, Any],
    mean: lora.Theta,
    curvature: Mapping[str, Block] | None = None,
    precision: Mapping[str, float] | None = None,
    full: Full | None = None,
    width: float = 1.0,
    particles: Sequence[lora.Theta] = (),
    weights: Sequence[float] = (),
    rows: Sequence[Example] = (),
) -> Posterior:
    """Write a posterior folder and load it back. A crash or a full disk leaves what was there before.

    Raises PosteriorError where something other than one posterior is in its place. Calibrations of the same
    distribution stay.
    """
    folder = destination(folder)
    with atomic.folder(folder, check_replaceable) as work:
        lora.write_adapter(work / "map", mean, lora_config)
        for index, theta in enumerate(particles):
            lora.write_adapter(work / "particles" / f"{index:03d}", theta, lora_config)
        if family == "laplace":
            save_file(packing.pack(curvature or {}, precision or {}), work / "laplace.safetensors")
        if full is not None:
            save_file(packing.pack_full(full), work / FULL)
        if rows:
            save_file({"digest": digests(rows)}, work / ROWS)
        written = record.write(
            work,
            family=family,
            base=base,
            task=task.to_json(),
            lora=lora_config,
            weights=list(weights),
            width=width,
            provenance={"prior": dict(prior), "fit": dict(fit)},
        )
        earlier = folder / records.FOLDER
        if earlier.is_dir() and record.read(folder).hash == written:
            shutil.copytree(earlier, work / records.FOLDER)
    return load(folder)


def load(folder: Path | str) -> Posterior:
    """Read and verify a posterior folder. Every mismatch raises PosteriorError with one clear line."""
    folder = Path(folder).resolve()
    atomic.recover(folder)
    found = record.read(folder)
    content = found.content
    try:
        _verify_files(folder, found.files)
        family = content["family"]
        if family not in ("laplace", "particles"):
            raise PosteriorError(f"{folder} has family {family!r}; this version knows 'laplace' and 'particles'")
        curvature, precision = packing.unpack(folder / "laplace.safetensors") if family == "laplace" else ({}, {})
        task = Task.from_json(content["task"])
        posterior = Posterior(
            path=folder,
            hash=found.hash,
            family=family,
            base=dict(content["base"]),
            task=task,
            lora=dict(content["lora"]),
            prior=dict(content["prior"]),
            fit=dict(content["fit"]),
            weights=tuple(map(float, content["weights"])),
            **_calibrations(folder, content["base"]["hash"], found.hash, task, family),
            curvature=curvature,
            precision=precision,
            full=packing.unpack_full(folder / FULL, precision) if FULL in found.files else None,
            width=float(content.get("width", 1.0)),  # older folders have none
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PosteriorError(record.damaged(folder, error)) from None
    _verify_tensors(posterior)
    return posterior


def calibrated_again(posterior: Posterior) -> Posterior:
    """The posterior with what calibrations its folder holds now. Raises PosteriorError for a bad one, and where the
    folder holds another posterior by now."""
    if record.read(posterior.path).hash != posterior.hash:
        raise PosteriorError(f"{posterior.path} holds another posterior by now")
    base = posterior.base["hash"]
    found = _calibrations(posterior.path, base, posterior.hash, posterior.task, posterior.family)
    return replace(posterior, **found)


def _calibrations(folder: Path, base: str, hash: str, task: Task, family: Family) -> dict[str, Any]:
    """What `posterior calibrate` wrote into a folder, by its name in Posterior. Raises PosteriorError."""
    return {
        "calibration": records.load(folder, base=base, posterior=hash, task=task),
        "choice": choice.load(folder, posterior=hash, predictives=PREDICTIVES[family]),
        "familiarity": familiarity.load(folder, base=base, posterior=hash, task=task),
        "texts": rightness.load(folder, base=base, posterior=hash),
        "probes": probes.load(folder, base=base, posterior=hash, task=task),
    }


def _verify_files(folder: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise PosteriorError(f"{folder}/posterior.json names {name!r}, which is outside the folder; refused")
        if not path.is_file():
            raise PosteriorError(f"{folder} is incomplete: {name} is missing; copy the whole folder or refit")
        if record.file_hash(path) != expected:
            raise PosteriorError(
                f"{folder}/{name} is not the file that was fitted (its sha256 differs); restore it or refit"
            )
    for needed in ("map/adapter_config.json", "map/adapter_model.safetensors"):
        if needed not in files:
            raise PosteriorError(f"{folder}/posterior.json does not list {needed}; refit")


def _verify_tensors(posterior: Posterior) -> None:
    mean = lora.read_adapter(posterior.map_dir)
    folders = [posterior.map_dir]
    if posterior.family == "laplace":
        blockwise.check(posterior.curvature, posterior.precision, mean)
        if not 0 < posterior.width <= 1:
            raise PosteriorError(f"{posterior.path} has draws of width {posterior.width}; it must be in (0, 1]; refit")
    else:
        if (
            not posterior.weights
            or min(posterior.weights) < 0
            or not math.isclose(sum(posterior.weights), 1.0, abs_tol=1e-6)
        ):
            raise PosteriorError(f"{posterior.path} needs particle weights that are non-negative and sum to 1; refit")
        folders += posterior.adapters(len(posterior.weights), posterior.path)
    shapes = {name: value.shape for name, value in mean.items()}
    for folder in folders:
        theta = lora.read_adapter(folder)
        if {name: value.shape for name, value in theta.items()} != shapes:
            raise PosteriorError(f"{folder} has other matrices than map/; refit")
        packing.check_finite(folder, theta)
