"""Predictives, labels and a record to test with."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from posterior.calibration import records
from posterior.calibration.records import Key, Record
from posterior.data.task import Task
from posterior.evaluation.calibrate import measure

TASK = Task("choice", "{text}:", ("a", "b", "c"))
KEY = Key(
    base="sha256:00",
    posterior="11",
    template=records.template_hash(TASK),
    predictive="mixture",
    particles=8,
    dtype="float32",
)


def draw(n: int, seed: int = 0, c: int = 3, sharpness: float = 2.5) -> tuple[Tensor, Tensor]:
    """Over-confident probabilities [n, c] and labels [n] that follow softer ones; the last answer is favoured."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, c, generator=generator, dtype=torch.float64) * 1.5
    y = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
    return (scores * sharpness + torch.arange(c)).softmax(1), y


def ragged(n: int) -> tuple[Tensor, Tensor, list[int]]:
    """As `draw`, of two, three or five options each, with p = 0 behind them; and how many each row has."""
    p, y, widths = torch.zeros(n, 5, dtype=torch.float64), torch.zeros(n, dtype=torch.long), []
    for row in range(n):
        width = (2, 3, 5)[row % 3]
        own, label = draw(1, seed=row, c=width)
        p[row, :width], y[row] = own[0], label[0]
        widths.append(width)
    return p, y, widths


@cache
def make(n: int = 80, **changes: Any) -> Record:
    p, y = draw(n)
    options: dict[str, Any] = {"method": "temperature", "score": "lac", "coverage": 0.9, "key": KEY} | changes
    return measure(p, y, data="sha256:22", **options)
