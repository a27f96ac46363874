"""The weights of an HF folder: complete, known by their hash, and read one tensor at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from posterior.errors import PosteriorError, first_line
from posterior.files import atomic, objects

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of which a base has


def weights_hash(folder: Path, cache: Path) -> str:
    """The hash of the folder's weights, remembered as long as no file of them changes size or time."""
    _check_parts(folder)
    where = _weight_map(folder, "base")
    stats = {name: (folder / name).stat() for name in sorted(set(where.values()))}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    memory = cache / "hashes" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"
    try:
        known = objects.read(memory)
        if known["files"] == files:
            return str(known["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing remembered, or nothing readable: compute it
    value = _hash_tensors(Tensors(folder))
    with contextlib.suppress(OSError, PosteriorError):  # a read-only or full cache only costs time at the next start
        memory.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(memory, json.dumps({"folder": str(folder), "files": files, "hash": value}).encode())
    return value


class Tensors(Mapping[str, Tensor]):
    """The tensors of an HF folder by name, each read when it is asked for.

    kind: what errors call the folder. Raises PosteriorError for weights that are missing, partial or damaged.
    """

    def __init__(self, folder: Path, kind: str = "base") -> None:
        self._folder, self._kind = folder, kind
        where = _weight_map(folder, kind)
        try:
            files: dict[str, Any] = {name: safe_open(folder / name, framework="pt") for name in set(where.values())}
            self._files = {name: files[where[name]] for name in sorted(where)}
            self._slices = {name: file.get_slice(name) for name, file in self._files.items()}
        except (OSError, SafetensorError) as error:
            raise _damaged(folder, kind, error) from error

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(self._folder, self._kind, error) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def dtype(self, name: str) -> str:
        """As safetensors spells it: "BF16"."""
        return str(self._slices[name].get_dtype())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())


def _check_parts(folder: Path) -> None:
    """PosteriorError unless configuration and tokenizer are there."""
    if not (folder / "config.json").is_file():
        raise PosteriorError(f"base {folder} has no config.json: expected a Hugging Face model folder")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise PosteriorError(f"base {folder} has no tokenizer (tokenizer.json): download it again")


def _weight_map(folder: Path, kind: str) -> Mapping[str, str]:
    """{tensor: file} of an HF folder; PosteriorError unless the files are there."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            where: Mapping[str, str] = objects.read(index)["weight_map"]
            if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
                raise ValueError("the weight_map of its index is no object of file names")
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                where = dict.fromkeys(file.keys(), "model.safetensors")
    except FileNotFoundError as error:
        raise PosteriorError(f"{kind} {folder} has no model.safetensors, the one weight format that is read") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(folder, kind, error) from error
    absent = sorted({name for name in where.values() if not (folder / name).is_file()})
    if absent:
        raise PosteriorError(f"{kind} {folder} is partial: {', '.join(absent)} missing: download it again")
    return where


def _hash_tensors(tensors: Tensors) -> str:
    """sha256 over (name, dtype, shape, bytes) of every tensor, in the order of the names, one in memory at a time."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def _damaged(folder: Path, kind: str, error: Exception) -> PosteriorError:
    return PosteriorError(f"{kind} {folder} has damaged weights ({first_line(error)}): download it again")
