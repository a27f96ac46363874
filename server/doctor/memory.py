"""Whether what is to be loaded fits into memory, with the sum."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from posterior.errors import PosteriorError
from server.configuration.schema import ServeSettings
from server.doctor import bases
from server.doctor.line import Line
from server.doctor.served import has_laplace, readable
from server.workers import memory as machine

GIB = 2**30
PROCESS = 0.7 * GIB  # bytes of Python, torch and vLLM, in each process
CPU_KV_CACHE = 1.0  # GiB, as server/engine/config.py has it
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
FULL = 0.9  # of the free memory: more is a warning
SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits")
WORKER = {dtype: f"base of the linearised worker in {dtype}" for dtype in ("float32", "bfloat16")}


@dataclass(frozen=True)
class Weights:
    """Parameters, and the bytes of their files."""

    count: int
    bytes: int


def weights(folder: Path) -> Weights:
    """Of all safetensors in a folder, by their headers. Raises OSError and ValueError."""
    count = size = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: Mapping[str, Any] = json.loads(file.read(min(length, 2**27)))
        shapes = [(each["dtype"], prod(each["shape"])) for name, each in header.items() if name != "__metadata__"]
        count += sum(number for _, number in shapes)
        size += sum(WIDTHS.get(dtype, 4) * number for dtype, number in shapes)
    return Weights(count, size)


def lines(settings: ServeSettings) -> Iterator[Line]:
    """Whether what is to be loaded fits, with the sum."""
    try:
        folder = bases.find(settings.base)
    except PosteriorError as error:
        yield Line("base", "fail", str(error))
        return
    if folder is None:
        what = "the base is not on this machine yet, so the memory that it takes is not known"
        yield Line("base", "warn", what, "the first start downloads or converts it; ask again then")
        return
    try:
        base, config = weights(folder), json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Line("base", "fail", f"{folder} cannot be read ({error})", "download it again, or name another --base")
        return
    yield Line("base", "ok", f"{folder.name}, {base.count / 1e6:.0f} million parameters")
    gpus = _gpus()
    if settings.device == "cuda" and not gpus:
        yield Line("gpu", "fail", "--device cuda, but nvidia-smi shows no GPU", "use --device cpu")
    elif gpus and settings.device != "cpu":
        yield from _on_gpu(settings, base, config, *gpus[0])
    else:
        yield from _on_cpu(settings, base, config)


def _on_cpu(settings: ServeSettings, base: Weights, config: Mapping[str, Any]) -> Iterator[Line]:
    kv = settings.kv_cache_gib or CPU_KV_CACHE
    worker = settings.linearized != "off" and has_laplace(settings.posteriors)
    parts = {
        "base in vLLM": _in_engine(settings, base),
        f"KV cache ({_tokens(kv * GIB, config, settings)})": kv * GIB,
        **_adapters(settings),
        **({WORKER["float32"]: 4.0 * base.count} if worker else {}),
        f"{3 if worker else 2} processes": (3 if worker else 2) * PROCESS,
    }
    yield _sum("memory", parts, machine.free("cpu"), "free some, or give a smaller --kv-cache-gib or base")


def _on_gpu(
    settings: ServeSettings, base: Weights, config: Mapping[str, Any], name: str, total: float, free: float
) -> Iterator[Line]:
    yield Line("gpu", "ok", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    share = settings.gpu_memory_utilization * total
    own = {"base in vLLM": _in_engine(settings, base), **_adapters(settings)}
    kv = share - sum(own.values()) if settings.kv_cache_gib is None else settings.kv_cache_gib * GIB
    own[f"KV cache ({_tokens(max(kv, 0), config, settings)})"] = max(kv, 0)
    yield _sum("vLLM", own, min(share, free), "give a larger --gpu-memory-utilization, or a smaller base")
    if settings.linearized == "off" or not has_laplace(settings.posteriors):
        return
    if settings.linearized == "cpu":
        yield _sum(
            "worker", {WORKER["float32"]: 4.0 * base.count}, machine.free("cpu"), "free some, or give --linearized off"
        )
    elif settings.linearized in ("auto", "cuda", "cuda:0"):
        do = "give a smaller --gpu-memory-utilization, or --linearized cpu or off"
        yield _sum("worker", {WORKER["bfloat16"]: 2.0 * base.count}, max(free - share, 0), do)


def _sum(check: str, parts: Mapping[str, float], free: float, do: str) -> Line:
    """Whether the parts fit, written as the sum that they are."""
    total = sum(parts.values())
    said = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    what = f"{said} = {total / GIB:.2f} of {free / GIB:.2f} GiB"
    if total > free:
        return Line(check, "fail", what, do)
    return Line(check, "warn" if total > FULL * free else "ok", what, do if total > FULL * free else None)


def _in_engine(settings: ServeSettings, base: Weights) -> float:
    widths = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
    return base.count * widths[settings.dtype] if settings.dtype != "auto" else float(base.bytes)


def _tokens(size: float, config: Mapping[str, Any], settings: ServeSettings) -> str:
    """How many tokens a KV cache of so many bytes holds: keys and values of each layer's heads, in two bytes each."""
    own = config.get("text_config") or config
    try:
        heads = own.get("num_key_value_heads") or own["num_attention_heads"]
        width = own.get("head_dim") or own["hidden_size"] // own["num_attention_heads"]
        each = 2 * own["num_hidden_layers"] * heads * width * (4 if settings.dtype == "float32" else 2)
        return f"{int(size / each):,} tokens, 1/K of that for K particles"
    except (KeyError, TypeError, ZeroDivisionError):
        return "of a base whose size a token is not known"


def _adapters(settings: ServeSettings) -> dict[str, float]:
    """Every particle and theta*, each as large as the file of theta*."""
    count, size = 0, 0.0
    for folder, found in readable(settings.posteriors):
        path = folder / "map" / "adapter_model.safetensors"
        own = 1 + (len(found.content["weights"]) or settings.particles)
        count, size = count + own, size + own * (path.stat().st_size if path.is_file() else 0)
    return {f"{count} adapters": size}


def _gpus() -> list[tuple[str, float, float]]:
    """Name, total and free memory in bytes of each, as the driver says."""
    if shutil.which(SMI[0]) is None:
        return []
    try:
        done = subprocess.run(SMI, capture_output=True, text=True, timeout=3, check=True)
        rows = [line.rsplit(",", 2) for line in done.stdout.strip().splitlines()]
        return [(name.strip(), float(total) * 2**20, float(free) * 2**20) for name, total, free in rows]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
