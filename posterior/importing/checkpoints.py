"""Whole models that somebody trained become the particles of a posterior: each is an adapter that comes as near to it
as its rank allows (posterior/models/full.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posterior.calibration import metrics
from posterior.data import base_check, candidates
from posterior.data.examples import Examples, data_hash, encode
from posterior.data.reading import Row, Rows, read, source
from posterior.data.task import Task
from posterior.errors import PosteriorError, warn
from posterior.evaluation.predictions import map_scores
from posterior.importing.adapters import normalised
from posterior.models import full, lora, servable
from posterior.models.base import Base, context, load_model, load_tokenizer, resolve
from posterior.settings import Range, SettingError
from posterior.storage import artefact
from posterior.storage.destination import destination

RANKS = Range(1, servable.RANKS[-1])


def collect(
    checkpoints: Sequence[Path],
    *,
    task: Task,
    out: Path | str,
    base: str | None = None,
    weights: Sequence[float] | None = None,
    rank: int = full.RANK,
    rows: Rows | None = None,
) -> artefact.Posterior:
    """The posterior folder of the checkpoints, HF folders of models that were trained from the base. map/ holds the one
    of the largest weight, the first of several.

    All adapters have this rank, and the modules that any checkpoint changes. `fit` of the posterior says how much of
    each difference is left out, and with `rows` (labelled ones of the task) how far the answers' probabilities are from
    the checkpoint's: the total variation, half the sum of the absolute differences.

    Raises PosteriorError for checkpoints that are not the base with other matrices in linear layers.
    """
    if rank not in RANKS:
        raise SettingError("{rank} is {value}; it must be {allowed}", value=rank, allowed=RANKS)
    if rows is not None and not task.has_candidates:
        raise SettingError("{rows} compares the probabilities of answers; a text task has none, leave it out")
    folder = destination(out)
    shares = normalised(weights or [1.0] * len(checkpoints), len(checkpoints))
    found = resolve(base)
    tokenizer = load_tokenizer(found)
    if task.answers is not None:
        candidates.encode(tokenizer, task.answers)
    given = [] if rows is None else read(rows)
    examples = _encoded(task, tokenizer, given, found, "" if rows is None else source(rows))
    for each in checkpoints:
        warn(*full.check_tokenizer(each, tokenizer, task.chat))
    model = load_model(found, torch.float32, "cpu")
    warn(*base_check.check(tokenizer, base_check.scorer(model), task))
    wholes = [full.read(each, found.path, model) for each in checkpoints]
    modules = _changed(wholes, found)
    cuts = [full.cut(each, modules, rank) for each in wholes]
    answers = [_probabilities_of(each, model, examples) for each in wholes if examples]
    adapted = lora.attach(model, rank=rank, alpha=rank, targets=modules, base_id=found.id).eval()
    distances = [_distance(adapted, made, expected, examples) for made, expected in zip(cuts, answers, strict=False)]
    heaviest = shares.index(max(shares))
    return artefact.save(
        folder,
        family="particles",
        base={"id": found.id, "revision": found.revision, "hash": found.hash},
        task=task,
        lora_config=lora.config_of(adapted),
        prior={},
        fit={"method": "import", "map": heaviest} | _record(wholes, cuts, distances, given),
        mean=cuts[heaviest].theta,
        particles=[made.theta for made in cuts],
        weights=shares,
    )


def _encoded(task: Task, tokenizer: Any, rows: Sequence[Row], base: Base, source: str) -> Examples:
    longest = context(base)
    return encode(task, tokenizer, rows, longest=longest, limit=f"the base's context of {longest}", source=source)


def _changed(wholes: Sequence[full.Checkpoint], base: Base) -> list[str]:
    """The modules that any checkpoint changes. Raises PosteriorError for none."""
    for each in wholes:
        if not each.changed:
            warn(f"{each.folder} is the base itself: its particle changes nothing")
    found = dict.fromkeys(module for each in wholes for module in each.changed)
    if not found:
        raise PosteriorError(f"no checkpoint differs from the base {base.id}; name models that were trained from it")
    return list(found)


def _probabilities_of(whole: full.Checkpoint, model: Any, examples: Examples) -> Tensor:
    """p [N, C] of the whole model; the base is back in `model` afterwards."""
    with full.in_place(model, whole):
        return _probabilities(model, examples)


def _probabilities(model: Any, examples: Examples) -> Tensor:
    found = map_scores(model, examples).softmax(1)
    metrics.check(found)
    return found


def _distance(model: Any, made: full.Cut, expected: Tensor, examples: Examples) -> dict[str, float]:
    """The total variation between the adapter's probabilities and the expected ones [N, C], over the rows."""
    lora.put(model, made.theta)
    found = (_probabilities(model, examples) - expected).abs().sum(1) / 2
    return {"mean": float(found.mean()), "largest": float(found.max())}


def _record(
    wholes: Sequence[full.Checkpoint],
    cuts: Sequence[full.Cut],
    distances: Sequence[dict[str, float]],
    rows: Sequence[Row],
) -> dict[str, Any]:
    """What the posterior's folder keeps of how near the adapters come: by particle, and by module."""
    facts: list[dict[str, Any]] = [
        {"folder": str(whole.folder), "matrices": len(whole.changed), "error": made.error}
        for whole, made in zip(wholes, cuts, strict=True)
    ]
    for fact, distance in zip(facts, distances, strict=False):  # there are none without rows
        fact["total_variation"] = distance
    errors = {module: [made.errors[module] for made in cuts] for module in cuts[0].size}
    compared = {"compared": {"rows": len(rows), "hash": data_hash(rows)}} if rows else {}
    return {"checkpoints": {f"{number:03d}": fact for number, fact in enumerate(facts)}, "errors": errors} | compared
