"""Answers per second of a mixture of K particles: this server, K plain requests to stock vLLM, and transformers + peft.

All three score the same candidates of the same real prompts, unseen before in every repetition, with the same adapters,
precision and machine, taking turns. Stock vLLM is its own OpenAI server with the adapters as LoRA modules: one
request a
prompt and particle, all sent at once, `max_tokens=1`, `logprobs=20` (which may even miss a candidate).
transformers + peft runs the batch of prompts under one adapter after the other. Intervals: mean +- t * standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import torch
from scipy import stats

from posterior.data.candidates import encode
from posterior.models import base, lora, servable
from posterior.models.base import Base
from posterior.storage import artefact
from posterior.storage.artefact import Posterior
from server.configuration.schema import SHIPPED
from server.engine.config import EngineConfig, lora_targets, set_environment

DATA = Path(__file__).parent / "data" / "yelp.test.jsonl"
START_SECONDS = 300
MODEL_LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--posterior", type=Path, default=SHIPPED / "sentiment", help="a Laplace posterior of a choice task"
    )
    parser.add_argument("--base", help="its base model, as for `posterior serve`")
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL whose rows have the template's fields")
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16, help="prompts in each repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is first imported, so: once more, for transformers' sake
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.predictive", *sys.argv[1:]])
    model, posterior = base.resolve(args.base), artefact.load(args.posterior)
    texts = sample_prompts(posterior, args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_environment(device)
    with tempfile.TemporaryDirectory() as folder:
        adapters = posterior.adapters(args.particles, Path(folder) / "adapters")
        with (
            ours(model, posterior, args, Path(folder)) as server,
            stock(model, posterior, adapters, args, device) as vllm,
        ):
            ways: dict[str, Callable[[list[str]], None]] = {
                f"this server, `/v1/predictive`, one request, K={args.particles}": lambda t: ask_server(
                    server, posterior, t
                ),
                f"stock vLLM, {args.particles} requests a prompt": lambda t: asyncio.run(
                    ask_vllm(vllm, len(adapters), t)
                ),
                "transformers + peft, switching adapters": switching(model, posterior, adapters, args.dtype, device),
            }
            rates = measure(ways, texts, args.prompts)
    print(report(rates, args, device))


def sample_prompts(posterior: Posterior, args: argparse.Namespace) -> list[list[str]]:
    """One list of rendered prompts a repetition, and one before them to warm up; no row twice."""
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    random.Random(args.seed).shuffle(rows)
    texts = [posterior.task.render(row) for row in rows]
    needed = args.prompts * (args.repetitions + 1)
    if len(texts) < needed:
        sys.exit(f"{args.data} has {len(texts)} rows; {needed} are needed: lower --prompts or --repetitions")
    return [texts[i : i + args.prompts] for i in range(0, needed, args.prompts)]


def measure(
    ways: dict[str, Callable[[list[str]], None]], texts: list[list[str]], prompts: int
) -> dict[str, list[float]]:
    """Answers per second of each way and repetition, the ways taking turns; the first list of prompts only warms up."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repetition, batch in enumerate(texts):
        for name, way in ways.items():
            start = time.perf_counter()
            way(batch)
            if repetition:
                rates[name].append(prompts / (time.perf_counter() - start))
    return rates


def report(rates: dict[str, list[float]], args: argparse.Namespace, device: str) -> str:
    """A Markdown table: rates, and ratios of this server's rate to each, paired by repetition."""
    own = next(iter(rates.values()))
    lines = [
        f"{args.prompts} prompts x {args.particles} particles, {args.dtype} on {device} ({os.cpu_count()} cores), "
        f"seed {args.seed}, n = {args.repetitions} repetitions, 95 % intervals",
        "",
        "| way | answers/s | this server / it |",
        "|---|---|---|",
    ]
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(own, values, strict=True)]
        lines.append(f"| {name} | {interval(values)} | {interval(ratios)} |")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> str:
    tensor = torch.tensor(values, dtype=torch.float64)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(tensor.std()) / math.sqrt(len(values))
    return f"{float(tensor.mean()):.2f} ± {half:.2f}"


# The three ways


def ask_server(url: str, posterior: Posterior, texts: list[str]) -> None:
    body = {"model": posterior.name, "prompts": texts, "predictive": "mixture"}
    response = httpx.post(f"{url}/v1/predictive", json=body, timeout=600)
    response.raise_for_status()


async def ask_vllm(url: str, particles: int, texts: list[str]) -> None:
    body = {"max_tokens": 1, "temperature": 0, "logprobs": 20}
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=256)) as client:
        requests = (
            client.post(f"{url}/v1/completions", json={**body, "model": f"particle-{k}", "prompt": text})
            for text in texts
            for k in range(particles)
        )
        for response in await asyncio.gather(*requests):
            response.raise_for_status()


def switching(
    model: Base, posterior: Posterior, adapters: Sequence[Path], dtype: str, device: str
) -> Callable[[list[str]], None]:
    tokenizer = base.load_tokenizer(model)
    columns = [tokens[0] for tokens in encode(tokenizer, posterior.task.answers or ())]
    network = lora.load_peft(base.load_model(model, getattr(torch, dtype), device), adapters[0], name="0")
    for k, folder in enumerate(adapters[1:], start=1):
        network.load_adapter(str(folder), adapter_name=str(k), is_trainable=False)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.inference_mode()
    def ask(texts: list[str]) -> None:
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(device)
        for k in range(len(adapters)):
            network.set_adapter(str(k))
            network(**batch, logits_to_keep=1).logits[:, -1, columns].float().log_softmax(-1)

    return ask


# The two servers


def ours(
    model: Base, posterior: Posterior, args: argparse.Namespace, folder: Path
) -> contextlib.AbstractContextManager[str]:
    command = ["-m", "server.cli", "serve", "--base", str(model.path), "--posteriors", str(posterior.path.parent)]
    command += ["--particles", str(args.particles), "--dtype", args.dtype, "--max-model-len", str(MODEL_LENGTH)]
    return running(command, "/ready", {"POSTERIOR_CACHE": str(folder)})


def stock(
    model: Base, posterior: Posterior, adapters: Sequence[Path], args: argparse.Namespace, device: str
) -> contextlib.AbstractContextManager[str]:
    """vLLM's own server, with the arguments ours gives its engine."""
    config = EngineConfig(
        model=model.path,
        served_name="base",
        device=device,
        dtype=args.dtype,
        particles=args.particles,
        adapters=len(adapters),
        lora_rank=servable.rank(lora.read_config(posterior.map_dir)),
        targets=lora_targets(lora.modules(posterior.map_dir)),
        max_model_len=MODEL_LENGTH,
        max_num_seqs=64,
        gpu_memory_utilization=0.3,
    )
    modules = [f"particle-{k}={path}" for k, path in enumerate(adapters)]
    command = ["-m", "vllm.entrypoints.openai.api_server", *config.stock_arguments(), "--lora-modules", *modules]
    return running(command, "/health", {})


@contextlib.contextmanager
def running(
    command: Sequence[str], ready: str, environment: dict[str, str], folder: Path | None = None
) -> Iterator[str]:
    """A server on a free loopback port, started in a folder, up to the end of the block. Yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        arguments,
        env={**os.environ, **environment},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(START_SECONDS):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + ready).status_code == 200:
                    break
            if process.poll() is not None:
                sys.exit(f"{command[1]} ended with status {process.returncode} before it was ready")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
