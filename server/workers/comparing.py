"""What runs in the comparer's process: a model for each way to tell meanings apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from posterior.meaning import Comparison
from posterior.meaning.embedding import Embedding
from posterior.meaning.nli import Nli
from server.workers import child

_comparisons: dict[str, Comparison] = {}  # of a worker process; none in the server's own


def load(folders: Mapping[str, Path], threshold: float) -> None:
    """Hold the model of each name, "embedding" or "nli". Raises PosteriorError for one that cannot be read."""
    torch.set_num_threads(child.threads())
    for name, folder in folders.items():
        _comparisons[name] = Nli(folder) if name == "nli" else Embedding(folder, threshold)


def same(name: str, question: str, text: str, others: list[str]) -> list[bool]:
    """As Comparison, by the model of that name."""
    return _comparisons[name](question, text, others)
