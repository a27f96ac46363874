"""PEFT adapters that somebody trained become the particles of a posterior."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from posterior.data import base_check, candidates
from posterior.data.task import Task
from posterior.errors import PosteriorError, warn
from posterior.models import adalora, lora, servable
from posterior.models.base import load_model, load_tokenizer, resolve
from posterior.storage import artefact
from posterior.storage.destination import destination

# What makes an update of A and B, and so must be the same for all: the artefact keeps one configuration.
SCALE: dict[str, Any] = {"r": None, "lora_alpha": None, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}


def collect(
    adapters: Sequence[Path],
    *,
    task: Task,
    out: Path | str,
    base: str | None = None,
    weights: Sequence[float] | None = None,
) -> artefact.Posterior:
    """The posterior folder of the adapters. map/ holds the one of the largest weight, the first of several.

    Raises PosteriorError for adapters that are neither LoRA nor AdaLoRA, do not fit the base or each other, or that
    vLLM would not serve (posterior/models/servable.py).
    """
    folder = destination(out)
    shares = normalised(weights or [1.0] * len(adapters), len(adapters))
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(adalora.ordinary(each)) for each in adapters]
        configs = [lora.read_config(each) for each in folders]
        thetas = [read(each) for each in folders]
        check_alike(adapters, configs, thetas)
        found = resolve(base)
        tokenizer = load_tokenizer(found)
        if task.answers is not None:
            candidates.encode(tokenizer, task.answers)
        model = load_model(found, torch.float32, "cpu")
        warn(*base_check.check(tokenizer, base_check.scorer(model), task))
        lora.load_peft(model, folders[0])
    for each, config in zip(adapters, configs, strict=True):
        warn(*lora.other_base(each, config, found.id))
    heaviest = shares.index(max(shares))
    return artefact.save(
        folder,
        family="particles",
        base={"id": found.id, "revision": found.revision, "hash": found.hash},
        task=task,
        lora_config=configs[0] | {"base_model_name_or_path": found.id, "inference_mode": True},
        prior={},
        fit={"method": "import", "map": heaviest, "adapters": [str(path) for path in adapters]},
        mean=thetas[heaviest],
        particles=thetas,
        weights=shares,
    )


def normalised(weights: Sequence[float], count: int) -> list[float]:
    """Weights that sum to one."""
    if len(weights) != count:
        raise PosteriorError(f"{len(weights)} weights for {count} particles; give one for each, or none")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) <= 0:
        raise PosteriorError(f"the weights {list(weights)} must be numbers >= 0, not all zero")
    return [weight / sum(weights) for weight in weights]


def read(folder: Path) -> lora.Theta:
    """theta of a PEFT folder that can be served."""
    theta = lora.read_adapter(folder)
    servable.check_theta(folder, theta)
    return theta


def check_alike(folders: Sequence[Path], configs: Sequence[dict[str, Any]], thetas: Sequence[lora.Theta]) -> None:
    """Raises PosteriorError unless all adapters have the first one's matrices, shapes and update scale."""
    for folder, config, theta in zip(folders, configs, thetas, strict=True):
        for key, default in SCALE.items():
            first, this = (one.get(key) or default for one in (configs[0], config))
            if this != first:
                raise PosteriorError(f"{folder} has {key} {this}, but {folders[0]} has {first}; particles share it")
        shapes, expected = ({name: value.shape for name, value in one.items()} for one in (theta, thetas[0]))
        if shapes != expected:
            raise PosteriorError(f"{folder} adapts other modules than {folders[0]}, or in other shapes")
