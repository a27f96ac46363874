"""The weights of an HF folder: complete, and known by their hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from posterior.errors import PosteriorError, first_line
from posterior.files import atomic, objects


def weights_hash(folder: Path, cache: Path) -> str:
    """The hash of the folder's weights, remembered as long as no file of them changes size or time."""
    where = _weight_map(folder)
    stats = {name: (folder / name).stat() for name in sorted(set(where.values()))}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    memory = cache / "hashes" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"
    try:
        known = objects.read(memory)
        if known["files"] == files:
            return str(known["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing remembered, or nothing readable: compute it
    value = _hash_tensors(folder, where)
    with contextlib.suppress(OSError, PosteriorError):  # a read-only or full cache only costs time at the next start
        memory.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(memory, json.dumps({"folder": str(folder), "files": files, "hash": value}).encode())
    return value


def _weight_map(folder: Path) -> Mapping[str, str]:
    """{tensor: file} of an HF folder; PosteriorError unless configuration, tokenizer and weight files are there."""
    if not (folder / "config.json").is_file():
        raise PosteriorError(f"base {folder} has no config.json: expected a Hugging Face model folder")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise PosteriorError(f"base {folder} has no tokenizer (tokenizer.json): download it again")
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            where: Mapping[str, str] = objects.read(index)["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                where = dict.fromkeys(file.keys(), "model.safetensors")
    except FileNotFoundError as error:
        raise PosteriorError(f"base {folder} has no model.safetensors, the one weight format that is read") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(folder, error) from error
    absent = sorted({name for name in where.values() if not (folder / name).is_file()})
    if absent:
        raise PosteriorError(f"base {folder} is partial: {', '.join(absent)} missing: download it again")
    return where


def _hash_tensors(folder: Path, where: Mapping[str, str]) -> str:
    """sha256 over (name, dtype, shape, bytes) of every tensor, in the order of the names, one in memory at a time."""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        try:
            files = {f: stack.enter_context(safe_open(folder / f, framework="pt")) for f in sorted(set(where.values()))}
            for name in sorted(where):
                tensor = files[where[name]].get_tensor(name)
                digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        except (OSError, SafetensorError) as error:
            raise PosteriorError(
                f"base {folder} has damaged weights ({first_line(error)}): download it again"
            ) from error
    return f"sha256:{digest.hexdigest()}"


def _damaged(folder: Path, error: Exception) -> PosteriorError:
    return PosteriorError(f"base {folder} has damaged weights ({first_line(error)}): download it again")
