"""Does memory grow with finished requests? Many short gangs, some of whose clients leave; resident memory by process.

    python -m benchmarks.soak               10,000 requests (some minutes on 2 cores)

Prints the resident set after each tenth of the requests, and the growth over the second half in KiB a request. All
requests have one shape, and few run at once: for every batch size that it meets for the first time, the CPU's matrix
library keeps some tens of KiB, which is no matter of how many requests have finished (--at-once 32 shows it, and
--plain that it is so without gangs).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from typing import Any

import psutil

from benchmarks.engines import configured, running_engine, wait_passively
from server.engine import Adapter
from server.engine.config import set_environment
from server.engine.gang import Trace

FLAT = 1.0  # KiB a request: 10,000 requests then cost less than 10 MiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="as for `posterior serve`")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="plain requests instead of gangs, as many rows")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    wait_passively("benchmarks.soak")
    set_environment("cpu")
    sys.exit(asyncio.run(run(args)))


async def run(args: argparse.Namespace) -> int:
    config = configured(args.base, args.particles, "cpu", args.dtype, sequences=128)
    async with running_engine(args.base, args.particles, config) as (engine, adapters):
        return await soak(engine, adapters, args)


async def soak(engine: Any, adapters: list[Adapter], args: argparse.Namespace) -> int:
    rng, slots = random.Random(0), asyncio.Semaphore(args.at_once)

    async def one(number: int) -> None:
        body = {"prompt": f"Number {number:06d}:", "max_tokens": 2, "temperature": 1.0, "logprobs": 1}
        if args.plain:
            rows = [engine.complete({**body, "model": adapter.name}, None) for adapter in adapters]
        else:
            trace = Trace(tuple(adapters), (1.0,) * len(adapters), "sequence")
            rows = [engine.complete({**body, "model": "p0"}, None, trace)]
        async with slots:
            task = asyncio.ensure_future(asyncio.gather(*rows))
            if rng.random() < 0.05:  # some clients leave
                await asyncio.wait([task], timeout=0.02)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            else:
                await task

    sizes: list[dict[str, float]] = []
    for tenth in range(10):
        per = args.requests // 10
        await asyncio.gather(*(one(number) for number in range(tenth * per, (tenth + 1) * per)))
        sizes.append(resident())
        print(
            f"{(tenth + 1) * per} requests: " + ", ".join(f"{n} {m:.1f} MiB" for n, m in sizes[-1].items()), flush=True
        )
    grown = {name: (sizes[-1][name] - sizes[4][name]) * 1024 / (args.requests / 2) for name in sizes[-1]}
    worst = max(grown.values())
    print(f"growth over the second half, KiB a request: {', '.join(f'{n} {g:+.2f}' for n, g in grown.items())}")
    print(f"target: below {FLAT}: {'met' if worst < FLAT else 'MISSED'}")
    return int(worst >= FLAT)


def resident() -> dict[str, float]:
    """MiB of this process (front end), and of the engine core, its largest child."""
    own = psutil.Process()
    sizes = [child.memory_info().rss / 2**20 for child in own.children(recursive=True)]
    return {"front end": own.memory_info().rss / 2**20, "engine core": max(sizes)}


if __name__ == "__main__":
    main()
