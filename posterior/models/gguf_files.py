"""GGUF files, turned into HF folders that tokenise as llama.cpp does."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from posterior.errors import PosteriorError, first_line
from posterior.files import atomic

CONVERSION = 2  # part of the cache key: raise it whenever a converted folder would come out differently


def converted(gguf: Path, key: str, cache: Path) -> Path:
    """The HF folder of a GGUF file, its weights dequantised to bfloat16. Made once, in full or not at all."""
    folder = cache / "base" / f"{key}-v{CONVERSION}"
    try:
        if folder.exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic.locked(folder.parent / "conversion"):
            if not folder.exists():  # else another process made it while this one waited
                with atomic.folder(folder) as scratch, _read_once():
                    _convert(gguf, scratch)
    except Exception as error:  # the readers of GGUF raise whatever a damaged file leads them to
        if isinstance(error, OSError) and error.errno and error.filename != str(gguf):
            raise atomic.unusable(cache, error) from error
        raise PosteriorError(f"{gguf} cannot be converted into {folder}: {first_line(error)}") from error
    return folder


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers parses the file anew for the configuration, the weights and the tokenizer, and makes the table of
    tensor names for every module: half of a conversion's time."""
    import gguf

    own = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in own.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(gguf, name, function)


def _convert(gguf: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=plain, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    reader = GGUFReader(gguf)
    found = {name: reader.get_field(f"tokenizer.ggml.{name}") for name in _HEEDED}
    _heed(tokenizer, {name: field.contents() for name, field in found.items() if field is not None})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_SPACE = "\u2581"  # how sentencepiece writes one
_HEEDED = ("model", "pre", "add_bos_token", "add_eos_token", "add_space_prefix")  # fields that transformers leaves out
# Byte-level tokenizers, by `pre`, that llama.cpp begins with BOS where the file does not say (llama-vocab.cpp).
_BEGUN = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}


def _heed(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Makes the tokenizer of a GGUF file do what the fields say, and where they say nothing, what llama.cpp does."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    kind, pre = fields.get("model"), fields.get("pre")
    if pre == "smollm":  # each digit stands alone
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    if kind == "llama" and fields.get("add_space_prefix") is False:
        backend.normalizer = normalizers.Replace(" ", _SPACE)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_bos_token = bool(fields.get("add_bos_token", kind == "llama" or pre in _BEGUN))
    tokenizer.add_eos_token = bool(fields.get("add_eos_token", False))
