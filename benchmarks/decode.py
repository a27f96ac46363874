"""Tokens per second of text under K particles: lockstep in this engine, the same rows unmixed, and transformers + peft.

    python -m benchmarks.decode             1, 4 and 8 prompts; then one particle over HTTP against vLLM's own server
    python -m benchmarks.decode --samples 8 --prompts 1 2       so many samples of each prompt, beside the same unmixed

A user's token is one of the mixture's text: K rows of the batch. All ways use the same random adapters on q_proj and
v_proj, the same prompts, precision and machine, and take turns. transformers + peft mixes the same way, with a KV
cache for each particle: by switching adapters, and by peft's batches of mixed adapters. Ratios are paired by
repetition; mean +- t * standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import torch

from benchmarks.engines import configured, running_engine, wait_passively
from benchmarks.predictive import interval, running
from posterior.models import base
from posterior.models.base import Base
from server.engine import Adapter
from server.engine.config import EngineConfig, set_environment
from server.engine.gang import Trace

if TYPE_CHECKING:
    from server.engine.engine import VllmEngine

Way = Callable[[list[str]], Awaitable[float]]  # prompts -> user tokens per second
SWITCHING, BARE = "transformers + peft, switching adapters", "K rows a prompt without adapters: the most there is"
TOPICS = ["the sea", "bread", "winter", "a violin", "the moon", "a market", "chess", "rain", "a lighthouse", "ants"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="as for `posterior serve`")
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1, help="texts of each prompt; more than one are drawn")
    parser.add_argument("--repetitions", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="as for `posterior serve`")
    args = parser.parse_args()
    wait_passively("benchmarks.decode")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_environment(device, base.cache_folder() / "compiled" if args.compile else None)
    sequences = args.particles * max(args.prompts) * args.samples
    config = configured(args.base, args.particles, device, args.dtype, sequences=sequences, compiled=args.compile)
    print(
        f"{device}, {args.dtype}, {os.cpu_count()} cores, {'compiled' if args.compile else 'eager'}, "
        f"GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}, {args.tokens} tokens, {args.samples} texts a prompt, "
        f"n = {args.repetitions} repetitions, "
        "mean and 95 % interval"
    )
    asyncio.run(lockstep(args, config))
    if args.samples == 1:
        asyncio.run(one_particle(args, config))


async def lockstep(args: argparse.Namespace, config: EngineConfig) -> None:
    async with running_engine(args.base, args.particles, config) as (engine, adapters):
        await compare(args, engine, adapters, config.device)
        if args.samples == 1:
            print(await turns(engine, adapters, args.repetitions), flush=True)


async def compare(args: argparse.Namespace, engine: VllmEngine, adapters: Sequence[Adapter], device: str) -> None:
    body: dict[str, Any] = {"temperature": 0, "max_tokens": args.tokens, "ignore_eos": True}
    if args.samples > 1:
        body |= {"temperature": 1, "n": args.samples}

    async def mixed(prompts: list[str]) -> float:
        async def one(prompt: str) -> None:
            trace = Trace(tuple(adapters), (1.0,) * len(adapters), "sequence")
            await engine.complete({**body, "model": "p0", "prompt": prompt}, None, trace)

        return await timed(args.samples * len(prompts) * args.tokens, [one(prompt) for prompt in prompts])

    async def unmixed(prompts: list[str]) -> float:
        rows = [
            engine.complete({**body, "model": adapter.name, "prompt": prompt}, None)
            for prompt in prompts
            for adapter in adapters
        ]
        return await timed(args.samples * len(prompts) * args.tokens, rows)

    async def bare(prompts: list[str]) -> float:
        rows = [
            engine.complete({**body, "model": "base", "prompt": prompt}, None) for prompt in prompts for _ in adapters
        ]
        return await timed(len(prompts) * args.tokens, rows)

    ways: dict[str, Way] = {
        f"lockstep, K={args.particles}": mixed,
        f"the same {args.particles * args.samples} rows a prompt, unmixed": unmixed,
    }
    if args.samples > 1:
        for count in args.prompts:
            rates = await alternate(ways, count, args.repetitions)
            print(report(f"{count} prompt{'s' * (count > 1)}", rates, {1: 0.9}), flush=True)
        return
    peft = Peft(base.resolve(args.base), adapters, args, device)
    ways |= {
        SWITCHING: peft.switching,
        "transformers + peft, batches of mixed adapters": peft.batched,
        BARE: bare,
    }
    for count in args.prompts:
        rates = await alternate(ways, count, args.repetitions)
        print(report(f"{count} prompt{'s' * (count > 1)}", rates, {1: 0.95, 2: 8.0, 3: 2.0}))
        ratios = [a / b for a, b in zip(rates[BARE], rates[SWITCHING], strict=True)]
        print(f"\nwithout adapters and mixing / switching: {interval(ratios)}", flush=True)


async def alternate(ways: dict[str, Way], count: int, repetitions: int) -> dict[str, list[float]]:
    """User tokens per second of each way and repetition, the ways taking turns on the same `count` prompts."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        topics = [TOPICS[(repetition + i) % len(TOPICS)] for i in range(count)]
        prompts = [f"Tell me something about {topic} ({i})." for i, topic in enumerate(topics)]
        for name, way in ways.items():
            rate = await way(prompts)
            if repetition:  # the first only warms up
                rates[name].append(rate)
    return rates


async def turns(engine: VllmEngine, adapters: Sequence[Adapter], repetitions: int, count: int = 4) -> str:
    """Seconds to the first token of each turn of a chat, the turns before it in each particle's prefix cache or not."""

    async def first_token(text: str) -> float:
        trace = Trace(tuple(adapters), (1.0,) * len(adapters), "sequence")
        start = time.perf_counter()
        await engine.complete({"model": "p0", "prompt": text, "max_tokens": 1, "temperature": 0}, None, trace)
        return time.perf_counter() - start

    cached: list[list[float]] = [[] for _ in range(count)]
    fresh: list[list[float]] = [[] for _ in range(count)]
    for repetition in range(repetitions):
        chat, other = f"Chat {repetition}.", f"Talk {repetition}."
        for turn in range(count):
            said = f" User: tell me more about {TOPICS[turn]}. Assistant: " + f"{TOPICS[turn]} is old and wide. " * 12
            chat, other = chat + said, f"{turn} {other}{said}"  # the other's first word is new in every turn
            cached[turn].append(await first_token(chat))
            fresh[turn].append(await first_token(other))
    lines = ["", f"| turn of a chat, K={len(adapters)} | seconds, cached | not cached | ratio |", "|---|---|---|---|"]
    for turn, (warm, cold) in enumerate(zip(cached, fresh, strict=True), 1):
        ratios = [a / b for a, b in zip(warm, cold, strict=True)]
        lines.append(f"| {turn} | {interval(warm)} | {interval(cold)} | {interval(ratios)} |")
    return "\n".join(lines)


async def timed(tokens: int, work: Sequence[Awaitable[Any]]) -> float:
    start = time.perf_counter()
    await asyncio.gather(*work)
    return tokens / (time.perf_counter() - start)


def report(title: str, rates: dict[str, list[float]], targets: dict[int, float]) -> str:
    """A Markdown table; ratios are the first way's rate to each other's, with the target of each."""
    own = next(iter(rates.values()))
    lines = ["", f"| {title} | user tokens/s | first / this | target |", "|---|---|---|---|"]
    for number, (name, values) in enumerate(rates.items()):
        ratios = [a / b for a, b in zip(own, values, strict=True)]
        verdict = ""
        if number in targets:
            met = sum(ratios) / len(ratios) >= targets[number]
            verdict = f"≥ {targets[number]}: {'met' if met else 'MISSED'}"
        lines.append(f"| {name} | {interval(values)} | {interval(ratios)} | {verdict} |")
    return "\n".join(lines)


class Peft:
    """The mixture by transformers + peft, greedy, sequence weights, a KV cache for each particle."""

    def __init__(self, model: Base, adapters: Sequence[Adapter], args: argparse.Namespace, device: str) -> None:
        from peft import PeftModel

        self.tokenizer: Any = base.load_tokenizer(model)
        network: Any = base.load_model(model, getattr(torch, args.dtype), device)
        self.network = PeftModel.from_pretrained(network, str(adapters[0].path), adapter_name="0")
        for k, adapter in enumerate(adapters[1:], 1):
            self.network.load_adapter(str(adapter.path), adapter_name=str(k))
        self.network.eval()
        self.k, self.tokens, self.device = len(adapters), args.tokens, device

    def _prompts(self, prompts: list[str]) -> Any:
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        return self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.device)

    @torch.inference_mode()
    async def switching(self, prompts: list[str]) -> float:
        """All prompts in a batch, one particle after the other."""
        batch = self._prompts(prompts)
        start = time.perf_counter()
        caches: list[Any] = [None] * self.k
        tokens, mask = batch.input_ids, batch.attention_mask
        log_w = torch.zeros(self.k, len(prompts), device=self.device)
        for _ in range(self.tokens):
            laws = []
            for k in range(self.k):
                self.network.set_adapter(str(k))
                out = self.network(input_ids=tokens, attention_mask=mask, past_key_values=caches[k], use_cache=True)
                caches[k] = out.past_key_values
                laws.append(out.logits[:, -1].float().log_softmax(-1))
            tokens, log_w = self._next(torch.stack(laws), log_w)
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        return len(prompts) * self.tokens / (time.perf_counter() - start)

    @torch.inference_mode()
    async def batched(self, prompts: list[str]) -> float:
        """All prompts under all particles in one batch, by peft's `adapter_names`."""
        batch = self._prompts(prompts * self.k)
        names = [str(k) for k in range(self.k) for _ in prompts]
        start = time.perf_counter()
        cache: Any = None
        tokens, mask = batch.input_ids, batch.attention_mask
        log_w = torch.zeros(self.k, len(prompts), device=self.device)
        for _ in range(self.tokens):
            out = self.network(
                input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, adapter_names=names
            )
            cache = out.past_key_values
            laws = out.logits[:, -1].float().log_softmax(-1).view(self.k, len(prompts), -1)
            chosen, log_w = self._next(laws, log_w)
            tokens = chosen.repeat(self.k, 1)
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        return len(prompts) * self.tokens / (time.perf_counter() - start)

    @staticmethod
    def _next(laws: torch.Tensor, log_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [prompts, 1] and log-weights [K, prompts] from laws [K, prompts, V]."""
        chosen = torch.logsumexp(laws + log_w[..., None], 0).argmax(-1)
        gained = laws.gather(2, chosen[None, :, None].expand(len(laws), -1, 1))[..., 0]
        return chosen[:, None], (log_w + gained).log_softmax(0)


# One particle


async def one_particle(args: argparse.Namespace, config: EngineConfig) -> None:
    """The MAP of a served posterior, over HTTP, against vLLM's own server with the same adapter."""
    from tests.server import folders

    with tempfile.TemporaryDirectory() as scratch:
        model = base.resolve(args.base)
        posterior = folders.particles(Path(scratch), model)
        own = ["-m", "server.cli", "serve", "--base", str(model.path), "--posteriors", scratch, "--dtype", args.dtype]
        own += ["--max-model-len", "1024", "--max-num-seqs", str(config.max_num_seqs)]
        own += ["--compile"] * config.compiled
        stock = ["-m", "vllm.entrypoints.openai.api_server", *config.stock_arguments()]
        stock += ["--lora-modules", f"gang={posterior.map_dir}"]
        with (
            running(own, "/ready", {"POSTERIOR_CACHE": scratch + "/cache"}) as ours,
            running(stock, "/health", {}) as theirs,
        ):
            ways = {
                "this server, `particles: 1`": over_http(ours, args.tokens, {"uncertainty": {"particles": 1}}),
                "vLLM's own server": over_http(theirs, args.tokens, {}),
            }
            for count in args.prompts:
                rates = await alternate(ways, count, args.repetitions)
                print(report(f"one adapter over HTTP, {count} at once", rates, {1: 0.97}), flush=True)


def over_http(url: str, tokens: int, extra: dict[str, Any]) -> Way:
    async def ask(prompts: list[str]) -> float:
        body = {"model": "gang", "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **extra}
        async with httpx.AsyncClient(timeout=600) as client:
            work = [client.post(f"{url}/v1/completions", json={**body, "prompt": prompt}) for prompt in prompts]
            return await timed(len(prompts) * tokens, work)

    return ask


if __name__ == "__main__":
    main()
