"""The posterior folder: what `fit` writes and `serve` loads. JSON and safetensors only; every adapter is an ordinary
PEFT folder.

    posterior.json        format, family, base, task, LoRA, prior, fit, width of draws, sha256 of every file
    map/                  PEFT adapter theta*
    particles/000/ ...    PEFT adapters (family "particles")
    laplace.safetensors   curvature and prior precision of each matrix that is uncertain (family "laplace")
    full.safetensors      a sketch of the whole Fisher (posterior/sketch.py), unless the blocks are all that was wanted
    rows.safetensors      digests of the training rows, so that they are known again among test rows (not of an import)
    calibration/ ...      records of `posterior calibrate`, added later (posterior/calibration.py)

`hash` names the distribution: sha256 of posterior.json, which says nothing of calibrations.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posterior import calibration, laplace, lora
from posterior.data import Example, digests
from posterior.diagonal import Diagonal
from posterior.errors import PosteriorError
from posterior.kfac import Block, Factor, Kronecker
from posterior.sketch import Full, Signs
from posterior.task import Task

FORMAT = 1
ROWS = "rows.safetensors"
FULL = "full.safetensors"
Family = Literal["laplace", "particles"]


@dataclass(frozen=True)
class Posterior:
    """A verified posterior folder. base: {"id", "revision", "hash"}; weights: one per particle; prior, fit: as
    recorded; width: of Laplace draws (posterior/width.py)."""

    path: Path
    hash: str
    family: Family
    base: dict[str, Any]
    task: Task
    lora: dict[str, Any]
    prior: dict[str, Any]
    fit: dict[str, Any]
    weights: tuple[float, ...]
    calibration: Mapping[calibration.Key, calibration.Record] = field(default_factory=dict, repr=False)
    curvature: dict[str, Block] = field(default_factory=dict, repr=False)
    precision: dict[str, float] = field(default_factory=dict, repr=False)
    full: Full | None = field(default=None, repr=False)
    width: float = 1.0

    @property
    def law(self) -> laplace.Law:
        """The covariance of family "laplace" that the linearised predictive uses."""
        return self.full or laplace.Blocks(self.curvature, self.precision)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def map_dir(self) -> Path:
        return self.path / "map"

    def trained_on(self, examples: Sequence[Example]) -> int:
        """How many of the examples are rows of its fit; 0 for a folder that does not tell."""
        path = self.path / ROWS
        known = set(load_file(path)["digest"].tolist()) if path.is_file() else set()
        return sum(digest in known for digest in digests(examples).tolist())

    def check_base(self, base_hash: str) -> None:
        """Raises PosteriorError when the weights that were loaded are not the ones this posterior was fitted on."""
        if base_hash != self.base["hash"]:
            raise PosteriorError(
                f"posterior {self.name!r} was fitted on {self.base['id']} ({self.base['hash'][:19]}...), "
                f"but the loaded base has weights {base_hash[:19]}...; serve it with its own base or refit it"
            )

    def adapters(self, k: int, out: Path, seed: int = 0) -> list[Path]:
        """k particles as PEFT folders: those in the folder, or k Laplace draws written once under `out`.

        Raises PosteriorError when more particles are asked for than the folder has.
        """
        if k < 1:
            raise PosteriorError(f"{k} particles asked for; at least 1 is needed")
        if self.family == "particles":
            if k > len(self.weights):
                raise PosteriorError(f"posterior {self.name!r} has {len(self.weights)} particles, {k} were asked for")
            return [self.path / "particles" / f"{index:03d}" for index in range(k)]
        target = out / f"{self.hash[:12]}-k{k}-s{seed}"
        if not target.exists():
            mean, config = lora.read_adapter(self.map_dir), lora.read_config(self.map_dir)
            generator = torch.Generator().manual_seed(seed)
            with lora.atomic_folder(target) as work:
                for index in range(k):
                    draw = laplace.sample(self.curvature, self.precision, mean, generator, self.width)
                    lora.write_adapter(work / f"{index:03d}", draw, config)
        return [target / f"{index:03d}" for index in range(k)]


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
    """Write a posterior folder atomically (a crash or a full disk leaves what was there before) and load it back."""
    with lora.atomic_folder(folder) as work:
        lora.write_adapter(work / "map", mean, lora_config)
        for index, theta in enumerate(particles):
            lora.write_adapter(work / "particles" / f"{index:03d}", theta, lora_config)
        if family == "laplace":
            save_file(_pack(curvature or {}, precision or {}), work / "laplace.safetensors")
        if full is not None:
            save_file(_pack_full(full), work / FULL)
        if rows:
            save_file({"digest": digests(rows)}, work / ROWS)
        files = {str(path.relative_to(work)): _file_hash(path) for path in sorted(work.rglob("*")) if path.is_file()}
        record = {
            "format": FORMAT,
            "family": family,
            "base": dict(base),
            "task": task.to_json(),
            "lora": {
                key: lora_config.get(key) for key in ("r", "lora_alpha", "use_rslora", "target_modules", "lora_dropout")
            },
            "prior": dict(prior),
            "fit": dict(fit),
            "weights": list(weights),
            **({"width": width} if family == "laplace" else {}),
            "files": files,
        }
        (work / "posterior.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return load(folder)


def load(folder: Path | str) -> Posterior:
    """Read and verify a posterior folder. Every mismatch raises PosteriorError with one clear line."""
    folder = Path(folder).resolve()
    record = _read_record(folder)
    if record.get("format") != FORMAT:
        raise PosteriorError(
            f"{folder} has posterior format {record.get('format')!r}; this version reads {FORMAT}; upgrade or refit"
        )
    try:
        _verify_files(folder, record["files"])
        family = record["family"]
        if family not in ("laplace", "particles"):
            raise PosteriorError(f"{folder} has family {family!r}; this version knows 'laplace' and 'particles'")
        curvature, precision = _unpack(folder / "laplace.safetensors") if family == "laplace" else ({}, {})
        posterior = Posterior(
            path=folder,
            hash=_record_hash(record),
            family=family,
            base=dict(record["base"]),
            task=Task.from_json(record["task"]),
            lora=dict(record["lora"]),
            prior=dict(record["prior"]),
            fit=dict(record["fit"]),
            weights=tuple(map(float, record["weights"])),
            calibration=calibration.load(
                folder, base=record["base"]["hash"], posterior=_record_hash(record), task=Task.from_json(record["task"])
            ),
            curvature=curvature,
            precision=precision,
            full=_unpack_full(folder / FULL, precision) if FULL in record["files"] else None,
            width=float(record.get("width", 1.0)),  # older folders have none
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PosteriorError(
            f"{folder}/posterior.json is damaged: {type(error).__name__} at {error}; restore it or refit"
        ) from None
    _verify_tensors(posterior)
    return posterior


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "posterior.json").read_text(encoding="utf-8"))
    except OSError:
        raise PosteriorError(
            f"{folder} is no posterior folder: it has no readable posterior.json; make one with `posterior fit`"
        ) from None
    except ValueError:
        raise PosteriorError(f"{folder}/posterior.json is not JSON; restore it or refit") from None
    if not isinstance(record, dict):
        raise PosteriorError(f"{folder}/posterior.json is not a JSON object; restore it or refit")
    return record


def _verify_files(folder: Path, files: Mapping[str, str]) -> None:
    for name, expected in files.items():
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise PosteriorError(f"{folder}/posterior.json names {name!r}, which is outside the folder; refused")
        if not path.is_file():
            raise PosteriorError(f"{folder} is incomplete: {name} is missing; copy the whole folder or refit")
        if _file_hash(path) != expected:
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
        laplace.check(posterior.curvature, posterior.precision, mean)
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
        _finite(folder, theta)


def _finite(where: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise PosteriorError(
                f"{where} holds a value in {name} that is not finite; refit with a lower learning rate"
            )


def _pack(curvature: Mapping[str, Block], precision: Mapping[str, float]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, block in curvature.items():
        parts = {"precision": torch.tensor([precision[name]], dtype=torch.float64)}
        if isinstance(block, Diagonal):
            parts["diagonal"] = block.values
        else:
            parts |= {
                "small.basis": block.small.basis,
                "small.values": block.small.values,
                "large.basis": block.large.basis,
                "large.values": block.large.values,
                "large.rest": torch.tensor([block.large.rest], dtype=torch.float64),
            }
        tensors |= {f"{name}/{part}": value.cpu().contiguous() for part, value in parts.items()}
    return tensors


def _unpack(path: Path) -> tuple[dict[str, Block], dict[str, float]]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        raise PosteriorError(f"{path} is missing or no safetensors file; restore it or refit") from None
    _finite(path, tensors)
    curvature: dict[str, Block] = {}
    precision = {}
    for name in dict.fromkeys(key.rpartition("/")[0] for key in tensors):
        precision[name] = float(tensors[f"{name}/precision"][0])
        if f"{name}/diagonal" in tensors:
            curvature[name] = Diagonal(tensors[f"{name}/diagonal"])
            continue
        small = Factor(tensors[f"{name}/small.basis"], tensors[f"{name}/small.values"], 0.0)
        large = Factor(
            tensors[f"{name}/large.basis"], tensors[f"{name}/large.values"], float(tensors[f"{name}/large.rest"][0])
        )
        curvature[name] = Kronecker(small, large)
    return curvature, precision


def _pack_full(full: Full) -> dict[str, Tensor]:
    tensors = {f"narrow/{name}": signs for name, signs in full.signs.narrow.items()}
    tensors |= {f"wide/{width}": signs for width, signs in full.signs.wide.items()}
    tensors |= {"basis": full.basis.float(), "values": full.values}
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def _unpack_full(path: Path, precision: Mapping[str, float]) -> Full:
    tensors = load_file(path)
    _finite(path, {name: tensors[name] for name in ("basis", "values")})
    parts = [(name.partition("/"), value) for name, value in tensors.items() if "/" in name]
    signs = Signs(
        {key: value for (kind, _, key), value in parts if kind == "narrow"},
        {int(key): value for (kind, _, key), value in parts if kind == "wide"},
    )
    if set(signs.narrow) != set(precision) or len(tensors["basis"]) != signs.columns:
        raise PosteriorError(f"{path} does not fit laplace.safetensors; restore it or refit")
    return Full(signs, precision, tensors["basis"].double(), tensors["values"].double())


def _record_hash(record: Mapping[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "calibration"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
