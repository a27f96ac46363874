"""Two texts mean the same if the cosine of their sentence embeddings is at least a threshold.

The model is a folder of sentence-transformers: an encoder, whose vectors are averaged over the tokens or taken of the
first one, as the folder says. The vectors are of the texts alone: a question before them makes all cosines depend on
its length, and after a long one those of other meanings reach .99 too (benchmarks/meaning.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from posterior.errors import PosteriorError, first_line
from posterior.files import objects
from posterior.meaning import THRESHOLD, reader

KEPT = 2**12  # vectors that are remembered: a text is compared again and again

Pooling = Literal["mean", "cls"]


class Embedding:
    """A Comparison by sentence embeddings."""

    def __init__(self, folder: Path, threshold: float = THRESHOLD) -> None:
        """Raises PosteriorError for a folder that cannot be read as one of sentence-transformers."""
        from transformers import AutoModel

        encoder, self._pooling, longest = _layout(folder)
        read = reader.load(encoder, AutoModel, unused="pooler.")
        self._reader = replace(read, longest=min(read.longest, longest or read.longest))
        self._threshold = threshold
        self._kept: dict[str, Tensor] = {}

    def __call__(self, question: str, text: str, others: Sequence[str]) -> list[bool]:
        """As Comparison. The question is the same for all texts and is not read: it would make their vectors alike."""
        vectors = self._remembered([text, *others])
        return (vectors[1:] @ vectors[0] >= self._threshold).tolist()

    def _remembered(self, texts: Sequence[str]) -> Tensor:
        """As `vectors`, of which only those that are not known are computed."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        if len(self._kept) + len(new) > KEPT:
            self._kept.clear()
            new = list(dict.fromkeys(texts))
        self._kept.update(zip(new, self.vectors(new), strict=True))
        return torch.stack([self._kept[text] for text in texts])

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """[n, d], each of length 1. Raises PosteriorError for a text that the model cannot read whole."""
        pooled = [self._pooled(output.last_hidden_state, mask) for mask, output in self._reader.read(texts)]
        return torch.nn.functional.normalize(torch.cat(pooled), dim=-1) if pooled else torch.empty(0, 0)

    def _pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[B, d] of the tokens' vectors [B, T, d]."""
        if self._pooling == "cls":
            return hidden[:, 0]
        weight = mask[:, :, None].to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


def _layout(folder: Path) -> tuple[Path, Pooling, int | None]:
    """Of a folder of sentence-transformers: where the encoder is, how its vectors are pooled, and the most tokens that
    it is said to read. A folder without modules.json is an encoder alone, and its vectors are averaged."""
    if not (folder / "modules.json").is_file():
        return folder, "mean", None
    try:
        modules = json.loads((folder / "modules.json").read_text())
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise PosteriorError(
                f"{folder} has the modules {kinds}; expected a Transformer, a Pooling, and a Normalize or nothing: "
                "name another folder"
            )
        encoder, pooling = folder / modules[0]["path"], folder / modules[1]["path"]
        said = encoder / "sentence_bert_config.json"
        longest = objects.read(said).get("max_seq_length") if said.is_file() else None
        return encoder, _pooling(folder, objects.read(pooling / "config.json")), longest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PosteriorError(f"{folder} is no whole folder of sentence-transformers: {first_line(error)}") from error


def _pooling(folder: Path, config: Mapping[str, Any]) -> Pooling:
    """What 1_Pooling/config.json says, in the older form (a switch for each mode) or the newer one (a mode's name)."""
    switches = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    on = [switches.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    modes = [config["pooling_mode"]] if "pooling_mode" in config else on
    if modes == ["mean"]:
        return "mean"
    if modes == ["cls"]:
        return "cls"
    raise PosteriorError(f"{folder} pools by {modes}; expected 'mean' or 'cls' alone: name another folder")
