"""Tokens per second on CPU of rows that each have an adapter of their own: vLLM's LoRA, and ours
(server/engine/compat/cpu_lora.py).

Every way is one engine in a process of its own, all alive at once and taking turns, so that what else the machine does
hits all alike: compare the ratios, not the rates. Adapters are random, on q_proj and v_proj; requests are one prompt,
greedy, without end. "Cold" starts have an empty compilation cache, "warm" ones that of the start before; a start ends
with a first answer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = 1.5
PROMPT = "The history of the city of Vienna begins with"


@dataclass(frozen=True)
class Way:
    lora: bool
    ours: bool
    compiled: bool


WAYS = {
    "no LoRA, eager": Way(lora=False, ours=False, compiled=False),
    "no LoRA, compiled": Way(lora=False, ours=False, compiled=True),
    "vLLM's LoRA, eager": Way(lora=True, ours=False, compiled=False),
    "our LoRA, eager": Way(lora=True, ours=True, compiled=False),
    "our LoRA, compiled": Way(lora=True, ours=True, compiled=True),
}
REFERENCE = "no LoRA, compiled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="as for `posterior serve`")
    parser.add_argument("--rows", type=int, default=8, help="requests at once, each with its own adapter")
    parser.add_argument("--tokens", type=int, default=64, help="of each row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # these two: one way's own process
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        answer(args, WAYS[args.way])
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder, args.base = Path(folder), str(base_with_adapters(args, Path(folder)))
        cold = {}
        for name, way in WAYS.items():
            if way.compiled:
                with Child(args, name) as child:
                    cold[name] = child.seconds
        children = {name: Child(args, name) for name in WAYS}
        rates: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(args.repetitions):
            for name, child in children.items():
                rates[name].append(args.rows * args.tokens / child.ask())
        starts = {name: child.seconds for name, child in children.items()}
        for child in children.values():
            child.close()
    print(report(args, rates, cold, starts))


def base_with_adapters(args: argparse.Namespace, folder: Path) -> Path:
    """The base model's folder; writes one PEFT folder a row into `folder`."""
    import torch
    from safetensors.torch import save_file

    from posterior.models import base

    path = base.resolve(args.base).path
    config = json.loads((path / "config.json").read_text())
    width = config["hidden_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    outputs = {
        "q_proj": head * config["num_attention_heads"],
        "v_proj": head * config["num_key_value_heads"],
    }
    generator = torch.Generator().manual_seed(args.seed)
    for row in range(args.rows):
        weights = {}
        for layer in range(config["num_hidden_layers"]):
            for name, out in outputs.items():
                key = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora"
                weights[f"{key}_A.weight"] = 0.05 * torch.randn(args.rank, width, generator=generator)
                weights[f"{key}_B.weight"] = 0.05 * torch.randn(out, args.rank, generator=generator)
        adapter = folder / f"adapter-{row}"
        adapter.mkdir()
        save_file(weights, adapter / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": args.rank, "lora_alpha": args.rank, "target_modules": list(outputs)}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return path


class Child:
    """One way's process. Seconds are those from its start to the end of its first answer."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        options = ("base", "rows", "tokens", "rank", "dtype", "folder")
        command = [sys.executable, "-m", "benchmarks.cpu_lora", "--way", name]
        command += [text for option in options for text in (f"--{option}", str(getattr(args, option)))]
        environment = {
            **os.environ,
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
            "VLLM_CACHE_ROOT": str(args.folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(args.folder / "cache" / "inductor"),
            "VLLM_USE_AOT_COMPILE": "0",  # what it saves, vLLM 0.32.0 cannot load on CPU; torch's own cache works
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        environment.pop("TORCHDYNAMO_DISABLE", None)
        self._name = name
        self._process = subprocess.Popen(
            command,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        start = time.perf_counter()
        self._read()
        self.seconds = time.perf_counter() - start

    def ask(self) -> float:
        """Seconds all rows take together."""
        assert self._process.stdin
        print(file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> float:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        sys.exit(f"{self._name}: ended with status {self._process.wait()}")

    def close(self) -> None:
        self._process.communicate("")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def answer(args: argparse.Namespace, way: Way) -> None:
    """In the child: "seconds N" for a first answer of 4 tokens, then for one of all tokens for each line of stdin."""
    from vllm.config import CompilationMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from server.engine.compat import cpu_lora

    settings: dict[str, Any] = {
        "enforce_eager": not way.compiled,
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "block_size": 32,
        "async_scheduling": False,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 2048,
    }
    if way.lora:
        settings |= {"enable_lora": True, "max_loras": args.rows + 1, "max_lora_rank": args.rank}
    if way.ours:
        cpu_lora.install()
    config = EngineArgs(model=args.base, dtype=args.dtype, **settings).create_engine_config()
    if way.compiled:  # with LoRA, vLLM's CPU platform has put NONE here
        config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
    engine = LLMEngine.from_vllm_config(config)
    adapters = [LoRARequest(f"{row}", row + 1, str(args.folder / f"adapter-{row}")) for row in range(args.rows)]

    def generate(tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        for row, adapter in enumerate(adapters):
            engine.add_request(f"{row}-{start}", PROMPT, params, lora_request=adapter if way.lora else None)
        while engine.has_unfinished_requests():
            engine.step()
        print("seconds", time.perf_counter() - start, flush=True)

    generate(4)
    for _ in sys.stdin:
        generate(args.tokens)


def report(
    args: argparse.Namespace, rates: dict[str, list[float]], cold: dict[str, float], starts: dict[str, float]
) -> str:
    """A Markdown table: medians, and medians of the ratios within a repetition."""
    slower = {
        name: [r / own for r, own in zip(rates[REFERENCE], values, strict=True)] for name, values in rates.items()
    }
    lines = [
        f"{args.rows} rows x {args.tokens} tokens, rank {args.rank}, {args.dtype}, {os.cpu_count()} cores, "
        f"seed {args.seed}, medians [least, most] of n = {args.repetitions}",
        "",
        f"| way | tok/s | {REFERENCE} / it | start, cold | start, warm |",
        "|---|---|---|---|---|",
    ]
    for name, values in rates.items():
        first = f"{cold[name]:.0f} s" if name in cold else "as warm"
        lines.append(f"| {name} | {spread(values, 0)} | {spread(slower[name], 2)} | {first} | {starts[name]:.0f} s |")
    for name in ("our LoRA, eager", "our LoRA, compiled"):
        ratio = statistics.median(slower[name])
        verdict = "met" if ratio <= TARGET else "MISSED"
        lines.append(f"\n{name}: target <= {TARGET}x of compiled without LoRA: {verdict} ({ratio:.2f})")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


if __name__ == "__main__":
    main()
