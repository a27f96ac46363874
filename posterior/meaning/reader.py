"""Models that read texts: a folder of Hugging Face's format, of which only safetensors are weights and no code runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posterior.errors import PosteriorError, first_line

BATCH = 32  # texts, or pairs of texts
LONGEST = 2**15  # characters of a text or pair: far more than such models read, and counted in no time


@dataclass(frozen=True)
class Reader:
    """An encoder and its tokenizer; longest: the most tokens that it reads at once."""

    tokenizer: Any
    model: Any
    longest: int

    def read(self, texts: Sequence[str], seconds: Sequence[str] | None = None) -> Iterator[tuple[Any, Any]]:
        """(mask [B, T], what the model gives) of each batch of the texts, or of pairs of them with their `seconds`.

        Raises PosteriorError for a text that is longer than the model reads: what it would leave out may matter.
        """
        what = "a text" if seconds is None else "a pair of texts, each after the question,"
        for start in range(0, len(texts), BATCH):
            part = slice(start, start + BATCH)
            columns = [list(texts[part])] + ([] if seconds is None else [list(seconds[part])])
            longest = max(sum(map(len, row)) for row in zip(*columns, strict=True))
            if longest > LONGEST:
                raise self._too_long(what, f"{longest} characters")
            inputs = self.tokenizer(*columns, padding=True, return_tensors="pt", verbose=False)
            count = inputs["input_ids"].shape[1]
            if count > self.longest:
                raise self._too_long(what, f"{count} tokens")
            with torch.inference_mode():
                output = self.model(**inputs)
            yield inputs["attention_mask"], output

    def _too_long(self, what: str, size: str) -> PosteriorError:
        return PosteriorError(
            f"{what} has {size}; the model that tells meanings apart reads {self.longest} tokens: ask for shorter "
            "texts, give a shorter prompt, or tell meanings apart in another way"
        )


def load(folder: Path, kind: Any, *, unused: str | None = None) -> Reader:
    """The model in `folder`, of one of transformers' Auto classes, in float32 on the CPU.

    `unused`: the first part of the names of weights that may be missing. Raises PosteriorError for what cannot be read.
    """
    from transformers import AutoTokenizer

    own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **own)
        model, report = kind.from_pretrained(
            folder, **own, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except MemoryError:
        raise
    except Exception as error:
        raise PosteriorError(
            f"the model in {folder} cannot be loaded: {first_line(error)}; expected a Hugging Face folder with "
            "config.json, a tokenizer and model.safetensors"
        ) from error
    missing = sorted(name for name in report["missing_keys"] if unused is None or not name.startswith(unused))
    if missing:  # transformers would go on with random numbers in their place
        raise PosteriorError(
            f"the model in {folder} lacks {len(missing)} weights of a {type(model).__name__} ({missing[0]}, ...): name "
            "another folder"
        )
    if tokenizer.pad_token_id is None:
        raise PosteriorError(f"the tokenizer in {folder} has no padding token: name another folder")
    return Reader(tokenizer, model.eval().requires_grad_(False), min(tokenizer.model_max_length, _positions(model)))


def _positions(model: Any) -> int:
    """How many tokens there are positions for. RoBERTa's table begins after the row of its padding."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, torch.nn.Embedding):
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return int(getattr(model.config, "max_position_embeddings", 2**31))
