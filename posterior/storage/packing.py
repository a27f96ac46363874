"""A Gaussian's tensors in a posterior folder: curvature and prior precision of each matrix, and the sketch of the whole
Fisher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from posterior.curvature.diagonal import Diagonal
from posterior.curvature.kfac import Block, Factor, Kronecker
from posterior.curvature.sketch import Full, Signs
from posterior.errors import PosteriorError


def check_finite(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises PosteriorError for a value that is not finite."""
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise PosteriorError(
                f"{where} holds a value in {name} that is not finite; refit with a lower learning rate"
            )


def pack(curvature: Mapping[str, Block], precision: Mapping[str, float]) -> dict[str, Tensor]:
    """Each matrix's factors (or diagonal) and its prior precision."""
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


def unpack(path: Path) -> tuple[dict[str, Block], dict[str, float]]:
    """Curvature and prior precision by matrix. Raises PosteriorError."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        raise PosteriorError(f"{path} is missing or no safetensors file; restore it or refit") from None
    check_finite(path, tensors)
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


def pack_full(full: Full) -> dict[str, Tensor]:
    """The sketch's signs, and the eigenpairs of what it knows of the Fisher."""
    tensors = {f"narrow/{name}": signs for name, signs in full.signs.narrow.items()}
    tensors |= {f"wide/{width}": signs for width, signs in full.signs.wide.items()}
    tensors |= {"basis": full.basis.float(), "values": full.values}
    return {name: value.cpu().contiguous() for name, value in tensors.items()}


def unpack_full(path: Path, precision: Mapping[str, float]) -> Full:
    """Raises PosteriorError where it does not belong to these matrices."""
    tensors = load_file(path)
    check_finite(path, {name: tensors[name] for name in ("basis", "values")})
    parts = [(name.partition("/"), value) for name, value in tensors.items() if "/" in name]
    signs = Signs(
        {key: value for (kind, _, key), value in parts if kind == "narrow"},
        {int(key): value for (kind, _, key), value in parts if kind == "wide"},
    )
    if set(signs.narrow) != set(precision) or len(tensors["basis"]) != signs.columns:
        raise PosteriorError(f"{path} does not fit laplace.safetensors; restore it or refit")
    return Full(signs, precision, tensors["basis"].double(), tensors["values"].double())
