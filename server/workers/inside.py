"""What runs in the linearised predictive's process: the base, the MAP adapters of Laplace posteriors, and the moments
of scores."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from posterior.data.candidates import Candidates
from posterior.errors import PosteriorError
from posterior.laplace.linearized import LinearizedModel, dtype_on
from posterior.likelihood.footprint import Footprint
from posterior.models.base import Base
from posterior.storage import artefact
from server.workers import child

Moments = tuple[
    np.ndarray, np.ndarray
]  # mean [C], covariance [C, C]; arrays, because tensors would travel in shared memory

Folder = tuple[Path, str]  # of a posterior, and its hash
Loaded = tuple[dict[str, Footprint], dict[str, str]]  # by posterior: what its moments take, or why it cannot be read

logger = logging.getLogger("posterior.server")
_model: LinearizedModel | None = None  # of a worker process; None in the server's own


def load(base: Base, folders: Mapping[str, Folder], device: str) -> Loaded:
    """Hold the base and the posteriors until the server goes away. Raises PosteriorError where none of them can be
    read."""
    global _model
    torch.set_num_threads(child.threads())
    posteriors, refused = _readable(folders)
    _model = LinearizedModel(base, posteriors, dtype=getattr(torch, dtype_on(device)), device=device)
    return _model.footprints, refused


def limit(device: str, room: float) -> None:
    """From now on take no more of a GPU than what is held now and `room` bytes: more would be vLLM's."""
    _, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (held + room) / total), device)


def _readable(folders: Mapping[str, Folder]) -> tuple[dict[str, artefact.Posterior], dict[str, str]]:
    """The posteriors, and why others cannot be read. Raises PosteriorError where none of them can."""
    posteriors, refused = {}, {}
    for name, folder in folders.items():
        try:
            posteriors[name] = _unchanged(*folder)
        except (PosteriorError, OSError) as error:
            refused[name] = str(error)
    if refused and not posteriors:
        raise PosteriorError("; ".join(refused.values()))
    return posteriors, refused


def _unchanged(path: Path, expected: str) -> artefact.Posterior:
    """The posterior that the server has loaded: answers are labelled with its hash."""
    posterior = artefact.load(path)
    if posterior.hash != expected:
        raise PosteriorError(f"the posterior {path} has changed since the server loaded it; load it again")
    return posterior


def add(name: str, folder: Folder) -> Footprint:
    """Hold one more posterior. Raises PosteriorError, and then nothing has changed."""
    if _model is None:
        raise RuntimeError("the worker has no model")
    try:
        return _model.add(name, _unchanged(*folder))
    except BaseException:
        _model.remove(name)
        raise


def remove(name: str) -> None:
    """Forget a posterior."""
    if _model is not None:
        _model.remove(name)


def moments(name: str, prompts: list[tuple[int, ...]], candidates: list[Candidates], room: float) -> list[Moments]:
    """One batch. An error of a GPU stays, so that every later batch would fail: the worker ends."""
    if _model is None:
        raise RuntimeError("the worker has no model")
    try:
        found = _model.logits(name, prompts, candidates, room)
    except RuntimeError as error:
        if isinstance(error, torch.AcceleratorError) or _lost(_model.device):
            logger.error("the GPU failed: %s", error)
            os._exit(1)
        raise
    return [(mean.numpy(), covariance.numpy()) for mean, covariance in found]


def _lost(device: str) -> bool:
    """Whether a GPU answers with errors from now on."""
    try:
        if device != "cpu":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
