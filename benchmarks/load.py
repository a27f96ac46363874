"""Is text under load what it is alone? Gangs of K, plain requests and clients that leave, in a KV cache too small for
all.

    python -m benchmarks.load                       one seed: minutes on 2 cores
    python -m benchmarks.load --seeds 5             five loads
    python -m benchmarks.load --samples 4 --gangs 16 --plain 0 --kv-tokens 24000    16 clients that ask for samples

32 gangs of 8 in float32, with prompts of 5 to 600 tokens. With --samples, half of the gangs draw so many texts at
temperature 1. Every gang that was not abandoned is run again alone, with a fresh id: its tokens must be identical and
its log-probability equal within 1e-3 nats, and so of each of its samples. At the end the engine must hold no request
and no KV block. Ends with status 1 if anything differs."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY

from benchmarks.engines import configured, running_engine, wait_passively
from posterior.models import base
from server.engine import Adapter
from server.engine.config import set_environment
from server.engine.gang import Trace

WORDS = "the a sea of in time old house light and river stone when it was never here again so far"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="as for `posterior serve`")
    parser.add_argument("--gangs", type=int, default=32)
    parser.add_argument("--plain", type=int, default=16, help="plain requests among them")
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--kv-tokens", type=int, default=12_000, help="what the KV cache holds, all rows together")
    parser.add_argument("--leavers", type=float, default=0.2, help="share of the clients that leave")
    parser.add_argument("--samples", type=int, default=0, help="of half of the gangs")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    wait_passively("benchmarks.load")
    set_environment("cpu")
    sys.exit(asyncio.run(run(args)))


async def run(args: argparse.Namespace) -> int:
    size = args.kv_tokens * bytes_per_token(base.resolve(args.base).path, args.dtype)
    config = configured(args.base, args.particles, "cpu", args.dtype, sequences=64, kv_cache_bytes=size)
    async with running_engine(args.base, args.particles, config) as (engine, adapters):
        return sum([await load(engine, adapters, args, seed) for seed in range(args.seeds)])


def bytes_per_token(path: Path, dtype: str) -> int:
    import json

    config = json.loads((path / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    size = 4 if dtype == "float32" else 2
    return int(2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * size)


async def load(engine: Any, adapters: list[Adapter], args: argparse.Namespace, seed: int) -> int:
    """Returns how many gangs were wrong."""
    rng = random.Random(seed)
    jobs = []
    for number in range(args.gangs + args.plain):
        words = " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(5, 580)))
        body = {"prompt": f"{number} {words}", "max_tokens": args.tokens, "ignore_eos": True, "return_token_ids": True}
        ways = [{"temperature": 0}, {"temperature": 0.8, "seed": number, "top_p": 0.9}]
        if args.samples and number < args.gangs:
            ways += [{"temperature": 1, "seed": number, "n": args.samples}] * 2
        body |= rng.choice(ways)
        leaves = rng.uniform(0.5, 60) if rng.random() < args.leavers else None
        jobs.append((body, number < args.gangs, rng.choice(["sequence", "token"]), rng.uniform(0, 20), leaves))
    rng.shuffle(jobs)

    async def one(body: dict[str, Any], gang: bool, mixing: Any) -> tuple[list[list[int]], list[float]]:
        trace = Trace(tuple(adapters), (1.0,) * len(adapters), mixing) if gang else None
        answer = await engine.complete({**body, "model": "p0"}, None, trace)
        tokens = [choice["token_ids"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]
        texts = [trace.text(choice) for choice in range(len(tokens))] if trace else []
        return tokens, [sum(row[0] for row in text.rows) for text in texts]

    async def client(job: Any) -> tuple[list[list[int]], list[float]] | None:
        body, gang, mixing, arrives, leaves = job
        await asyncio.sleep(arrives)
        work = asyncio.ensure_future(one(body, gang, mixing))
        done, _ = await asyncio.wait([work], timeout=leaves)
        if not done:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        return work.result() if done else None

    before, start = preemptions(), time.monotonic()
    crowd = await asyncio.gather(*map(client, jobs))
    seconds = time.monotonic() - start
    wrong, compared = 0, 0
    for job, found in zip(jobs, crowd, strict=True):
        if found is not None:
            tokens, logprobs = await one(job[0], job[1], job[2])
            compared += 1
            if tokens != found[0] or any(abs(a - b) > 1e-3 for a, b in zip(logprobs, found[1], strict=True)):
                wrong += 1
                print(f"DIFFERS: gang={job[1]} {job[2]} {len(job[0]['prompt'].split())} words: {found} alone {tokens}")
    await asyncio.sleep(1)
    left = gauge("vllm:num_requests_running") + gauge("vllm:num_requests_waiting")
    usage = gauge("vllm:kv_cache_usage_perc")
    print(
        f"seed {seed}: {args.gangs} gangs of {args.particles} + {args.plain} plain in {seconds:.0f} s, "
        f"{len(jobs) - compared} left early, {preemptions() - before:.0f} preemptions; "
        f"{compared} compared with the same request alone: {wrong} differ; "
        f"left behind: {left:.0f} requests, {usage:.0%} of the KV cache",
        flush=True,
    )
    return wrong + int(left > 0 or usage > 0)


def gauge(name: str) -> float:
    return sum(s.value for family in REGISTRY.collect() for s in family.samples if s.name == name)


def preemptions() -> float:
    return gauge("vllm:num_preemptions_total")


if __name__ == "__main__":
    main()
