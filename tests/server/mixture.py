"""The posterior predictive of text by transformers + peft, teacher-forced: the independent computation for the
engine's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posterior.models import base as base_models
from posterior.models.base import Base
from posterior.predictive.decoding import Mixing


class Reference:
    """K adapters on one float32 base."""

    def __init__(self, base: Base, folders: Sequence[Path]) -> None:
        from peft import PeftModel

        model: Any = base_models.load_model(base, torch.float32, "cpu")
        self.model = PeftModel.from_pretrained(model, str(folders[0]), adapter_name="0")
        for k, folder in enumerate(folders[1:], 1):
            self.model.load_adapter(str(folder), adapter_name=str(k))
        self.model.eval()
        self.count = len(folders)

    @torch.no_grad()
    def log_p(self, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
        """log p_k(. | prompt, text before t) for t = 0 .. T, [T + 1, K, V], float64."""
        rows = []
        ids = torch.tensor([[*prompt, *text]])
        for k in range(self.count):
            self.model.set_adapter(str(k))
            logits = self.model(ids).logits[0, len(prompt) - 1 :]
            rows.append(logits.double().log_softmax(-1))
        return torch.stack(rows, 1)


def mixture(log_p: Tensor, text: Sequence[int], weights: Sequence[float], mixing: Mixing) -> tuple[Tensor, Tensor]:
    """(log-probabilities of the mixture [T + 1, V], weights [T + 1, K]) by a loop over tokens and particles."""
    w = torch.tensor(weights, dtype=torch.float64)
    w = w / w.sum()
    distributions, history = [], []
    for t in range(len(log_p)):
        distribution = torch.zeros(log_p.shape[2], dtype=torch.float64)
        for k in range(len(w)):
            distribution += w[k] * log_p[t, k].exp()
        distributions.append(distribution.log())
        history.append(w)
        if mixing == "sequence" and t < len(text):
            w = w * log_p[t, :, text[t]].exp()
            w = w / w.sum()
    return torch.stack(distributions), torch.stack(history)
