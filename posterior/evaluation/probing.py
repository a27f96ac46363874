"""What a posterior says of a few rows, computed with transformers and peft: the probes of its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from posterior.calibration import probes
from posterior.calibration.probes import Probe, Probes
from posterior.calibration.records import template_hash
from posterior.data.examples import Examples, encode
from posterior.data.reading import Row, Rows, read
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.evaluation.predictions import each_linearized, map_scores
from posterior.models import devices, lora
from posterior.models.base import context, load_model, load_tokenizer, resolve
from posterior.models.devices import Dtype
from posterior.storage import artefact

KEPT = frozenset(("label", "choices", "input", "text", "question", "answer", "messages", "tools", "response"))


def probe(posterior: artefact.Posterior, rows: Rows, *, base: str | None = None, device: str | None = None) -> Path:
    """Put probes into a posterior's folder; returns where.

    Args:
        rows: like the training data. The first few that are short enough are taken. Of rows that the posterior was not
            fitted on a server can also tell whether it is too sure.
        base: where the base is now; None: by the id in the posterior.

    Raises PosteriorError.
    """
    posterior.check_open()
    device = devices.check(device)
    found = resolve(base or posterior.base_spec)
    posterior.check_base(found.hash)
    model = lora.load_peft(load_model(found, torch.float32, device), posterior.map_dir).eval()
    longest = min(probes.MAX_TOKENS, context(found))
    return posterior.add_probes(made(model, posterior, load_tokenizer(found), read(rows), longest))


def made(
    model: Any,
    posterior: artefact.Posterior,
    tokenizer: Any,
    rows: Sequence[Row],
    longest: int | None = None,
) -> Probes:
    """Probes of the first rows that have at most `longest` tokens (None: MAX_TOKENS), by a model that has theta* in
    place and keeps it.

    Raises PosteriorError where no row is.
    """
    task = posterior.task
    chosen, whole = _chosen(task, tokenizer, rows, longest or probes.MAX_TOKENS)
    examples = probes.examples(task, tokenizer, chosen)
    k = min(probes.PARTICLES, len(posterior.weights) or probes.PARTICLES)
    each = [_probabilities(model, examples)]
    mean = lora.get(model)
    try:
        for theta in posterior.thetas(k):
            lora.put(model, theta)
            each.append(_probabilities(model, examples))
    finally:
        lora.put(model, mean)
    linearized: list[Any] = [None] * len(examples)
    if posterior.family == "laplace" and task.has_candidates:
        found = each_linearized(model, posterior.covariance, examples)
        linearized = [tuple(one.probability.clamp(0, 1).tolist()) for one in found]
    return Probes(
        base=posterior.base["hash"],
        posterior=posterior.hash,
        template=template_hash(task),
        dtype=_dtype(model),
        draws=posterior.sampler,
        heldout=posterior.trained_on(whole) == 0 and posterior.tells_rows,
        rows=tuple(
            Probe(
                row=_kept(task, row),
                label=example.label,
                probability=tuple(tuple(p[index, : len(example.continuations)].tolist()) for p in each),
                linearized=linearized[index],
            )
            for index, (row, example) in enumerate(zip(chosen, examples, strict=True))
        ),
    )


def _chosen(task: Task, tokenizer: Any, rows: Sequence[Row], longest: int) -> tuple[list[Row], Examples]:
    """The rows that become probes, and the same as tokens, whole. Raises PosteriorError."""
    found: list[Row] = []
    for row in rows:
        if len(found) < probes.ROWS and encode(task, tokenizer, [row])[0].row <= longest:
            found.append(row)
    if not found:
        raise PosteriorError(f"no row has at most {longest} tokens; give a shorter one for a probe")
    return found, encode(task, tokenizer, found)


def _probabilities(model: Any, examples: Examples) -> Tensor:
    """[N, C] of the active adapter, as a server compares them; 0 where a row has fewer candidates than another."""
    scores = map_scores(model, examples)
    if scores.shape[1] > 1:
        return scores.softmax(1).clamp(0, 1)
    lengths = torch.tensor([len(example.continuations[0]) for example in examples])
    return probes.probabilities(scores, lengths[:, None], examples.scoring).clamp(0, 1)


def _kept(task: Task, row: Row) -> dict[str, Any]:
    """The fields of a row that it is read by."""
    own = {name: value for name, value in row.items() if name in KEPT or name in task.fields}
    kept: dict[str, Any] = json.loads(json.dumps(own))
    return kept


def _dtype(model: Any) -> Dtype:
    """Of the base's weights; adapters may be more precise."""
    return cast(Dtype, str(model.get_base_model().dtype).removeprefix("torch."))
