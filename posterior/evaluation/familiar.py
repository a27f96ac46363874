"""What questions are familiar to a posterior: held-out prompts as its adapters read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from posterior.calibration.familiarity import AdapterName, Familiarity
from posterior.data.examples import Examples
from posterior.data.reading import Row
from posterior.data.task import Task
from posterior.likelihood.states import last_states
from posterior.models import lora
from posterior.storage import artefact


def familiarity(
    model: Any,
    posterior: artefact.Posterior,
    adapter: AdapterName,
    examples: Examples,
    rows: Sequence[Row],
    batch_size: int,
) -> Familiarity:
    """Of held-out rows, by the states of theta* or of the mixture's first particle; leaves theta as it was."""
    mean = lora.get(model)
    try:
        if adapter == "particle":
            lora.put(model, next(posterior.thetas(1)))
        states = last_states(model, examples, batch_size)
    finally:
        lora.put(model, mean)
    return Familiarity.fit(states, [asked(posterior.task, row) for row in rows])


def asked(task: Task, row: Row) -> str:
    """The question of a row, the same for all rows of a task that is no decision."""
    return task.question_of(row).model_dump_json(exclude={"name"}) if task.kind == "decision" else ""
