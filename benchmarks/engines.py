"""What the benchmarks of text share: an engine of ours with K random adapters, and threads that wait passively."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cpu_lora import base_with_adapters
from posterior.models import base
from posterior.models.lora import DEFAULT_TARGETS
from server.engine import Adapter
from server.engine.config import EngineConfig
from server.http.schemas import FIELDS

if TYPE_CHECKING:
    from server.engine.engine import VllmEngine

RANK = 8


def wait_passively(module: str) -> None:
    """Start this benchmark once more if OpenMP has not been told, as it reads the setting when torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def random_adapters(spec: str | None, count: int, folder: Path) -> list[Adapter]:
    """`count` random adapters on q_proj and v_proj of the base `spec`, written to `folder`."""
    base_with_adapters(argparse.Namespace(base=spec, rows=count, rank=RANK, seed=0), folder)
    return [Adapter(f"p{k}", folder / f"adapter-{k}", k + 1) for k in range(count)]


def configured(
    spec: str | None,
    particles: int,
    device: str,
    dtype: str,
    *,
    sequences: int,
    kv_cache_bytes: int | None = None,
    compiled: bool = False,
) -> EngineConfig:
    """As `posterior serve` would start its engine for one posterior of so many particles."""
    return EngineConfig(
        model=base.resolve(spec).path, served_name="base", device=device, dtype=dtype, particles=particles,
        adapters=particles + 1, lora_rank=RANK, max_model_len=1024, max_num_seqs=sequences, gpu_memory_utilization=0.5,
        targets=DEFAULT_TARGETS, kv_cache_bytes=kv_cache_bytes, compiled=compiled,
    )  # fmt: skip


@asynccontextmanager
async def running_engine(
    spec: str | None, particles: int, config: EngineConfig
) -> AsyncIterator[tuple[VllmEngine, list[Adapter]]]:
    """An engine and its random adapters "p0", "p1", ..., up to the end of the block."""
    from server.engine.engine import VllmEngine

    with tempfile.TemporaryDirectory() as folder:
        adapters = random_adapters(spec, particles, Path(folder))
        engine = await VllmEngine.start(config, {adapter.name: adapter for adapter in adapters}, adapters, FIELDS)
        try:
            yield engine, adapters
        finally:
            engine.stop()
