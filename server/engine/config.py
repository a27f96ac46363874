"""How the engine is started: our few settings as vLLM's command-line arguments, and its environment."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from posterior.models.servable import RANKS
from server.engine import Room

CPU_KV_CACHE_BYTES = 2**30  # unless the user gives another size
FEW_CORES = 4


@dataclass(frozen=True)
class EngineConfig:
    """`particles` adapters can share a batch, `adapters` fit into memory; lengths in tokens, GPU memory as a share.

    `targets`: the layers that adapters change, by the last part of their names; None: any. The others are spared LoRA's
    memory and calls. `kv_cache_bytes` None: what the GPU's share leaves, or CPU_KV_CACHE_BYTES. `compiled` is about the
    CPU only, where it needs a C++ compiler and a minute or two once; a GPU's engine always compiles.
    `tool_call_parser`: vLLM's name of the way the base writes tool calls; None: tools are refused. `traces`: the URL
    that spans are sent to; None: nowhere."""

    model: Path
    served_name: str
    device: str  # "cpu" or "cuda"
    dtype: str
    particles: int
    adapters: int
    lora_rank: int
    max_model_len: int
    max_num_seqs: int
    gpu_memory_utilization: float
    targets: tuple[str, ...] | None = None
    kv_cache_bytes: int | None = None
    compiled: bool = False
    tool_call_parser: str | None = None
    traces: str | None = None

    @property
    def room(self) -> Room:
        """What an engine that was started with this holds."""
        slots = self.particles + 1  # K particles and the MAP of a text request can share one batch
        rank = next((r for r in RANKS if r >= self.lora_rank), RANKS[-1])
        return Room(slots, max(self.adapters, slots), rank, self.targets)

    def arguments(self) -> list[str]:
        """vLLM's command line of our engine: the stock one, our scheduler and, in its workers, our mixing."""
        return [
            *self.stock_arguments(),
            *("--worker-extension-cls", "server.engine.compat.patch.WorkerExtension"),
            *("--scheduler-cls", "server.engine.compat.scheduler.GangScheduler"),
        ]

    def stock_arguments(self) -> list[str]:
        """The command line of vLLM's own server that this corresponds to."""
        room = self.room
        arguments = [
            *("--model", str(self.model), "--served-model-name", self.served_name, "--dtype", self.dtype),
            *("--max-model-len", str(self.max_model_len), "--max-num-seqs", str(self.max_num_seqs)),
            *("--enable-lora", "--max-lora-rank", str(room.rank)),
            *("--max-loras", str(room.slots), "--max-cpu-loras", str(room.places)),
            *("--enable-prefix-caching", "--no-async-scheduling"),
        ]
        if self.targets is not None:
            arguments += ["--lora-target-modules", *self.targets]
        if self.tool_call_parser is not None:
            arguments += ["--enable-auto-tool-choice", "--tool-call-parser", self.tool_call_parser]
        if self.traces is not None:
            arguments += ["--otlp-traces-endpoint", self.traces]
        cache = self.kv_cache_bytes
        if self.device == "cpu":
            # Blocks of 32 tokens, not 128, so that short prompts too share their prefix.
            arguments += ["--block-size", "32", *(() if self.compiled else ("--enforce-eager",))]
            cache = cache or CPU_KV_CACHE_BYTES
        else:
            arguments += ["--gpu-memory-utilization", str(self.gpu_memory_utilization)]
        return arguments if cache is None else [*arguments, "--kv-cache-memory-bytes", str(cache)]


def lora_targets(modules: Iterable[str]) -> tuple[str, ...]:
    """`EngineConfig.targets` of adapters that change these modules."""
    return tuple(sorted({name.rpartition(".")[2] for name in modules}))


def set_environment(device: str, compile_cache: Path | None = None) -> None:
    """Must run before the first import of vLLM; the engine's processes inherit it.

    `compile_cache`: where the CPU's engine keeps what it compiles; None: it does not compile.
    """
    if device == "cpu" and len(os.sched_getaffinity(0)) <= FEW_CORES:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # all compute; else one is left to the front end
    if device == "cpu" and compile_cache is None:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    elif device == "cpu":
        os.environ["VLLM_USE_AOT_COMPILE"] = "0"  # its cache cannot be read again on a CPU in vLLM 0.32
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compile_cache))
    if device == "cpu":  # glibc keeps freed tensors below 1 GiB: else each step's logits are pages to fault in anew
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            os.environ.setdefault(name, str(2**30))
    # The V1 runner, whatever this machine would choose: mixing and scoring change its sampling.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    for name, value in {
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning OpenMP threads make shared cores ten times slower
        "GOMP_SPINCOUNT": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # of the lock of tqdm's bars, which a process that gets SIGTERM leaves to Python's tracker to remove
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
    }.items():
        os.environ.setdefault(name, value)
