"""What this server costs a request of one adapter, against a server of another checkout (the one before a change).

    git worktree add ../before COMMIT
    python -m benchmarks.hot_path --before ../before --now --outcomes --log-format json

Both servers run all the time and take turns, n times, each beginning every other time. rate: tokens a second of several
texts at once by `sentiment/map`. first token: the median of streamed texts, one after the other. decisions: questions a
second by the MAP, several inputs at once. Every prompt is asked once a server. Ratios are paired by run; quoted are
the median, the least and the most.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import httpx

from benchmarks.cells import DATA
from benchmarks.engines import wait_passively
from benchmarks.predictive import running
from posterior.data.reading import read_rows
from posterior.evaluation.report import markdown_rows

HERE = Path(__file__).parents[1]
MODEL, TOKENS = "sentiment/map", 32
QUESTION = {"type": "predicate", "instructions": "The writer would come again."}
TARGETS = {"rate": "now / before >= .97", "first token": "now - before <= 3 ms", "decisions": "-"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="folder of the other checkout")
    parser.add_argument("--now", nargs=argparse.REMAINDER, default=[], help="options of this server; comes last")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--at-once", type=int, default=8)
    args = parser.parse_args()
    wait_passively("benchmarks.hot_path")
    texts = [row["text"][:300] for row in read_rows(DATA / "yelp.test.jsonl")]
    with (
        tempfile.TemporaryDirectory() as cache,
        started(args.before.resolve(), [], f"{cache}/before") as before,
        started(HERE, args.now, f"{cache}/now") as now,
    ):
        found = asyncio.run(measure({"before": before, "now": now}, texts, args.runs, args.at_once))
    print(f"{args.runs} runs, {args.at_once} at once, {os.cpu_count()} hardware threads, options {args.now}\n")
    print(report(found))


def started(checkout: Path, options: list[str], cache: str) -> Any:
    """The server of a checkout, with the shipped posteriors of this one."""
    command = ["-m", "server.cli", "serve", "--posteriors", str(HERE / "posterior" / "shipped"), *options]
    path = os.pathsep.join(str(folder) for folder in (checkout, checkout / "clients" / "python"))
    return running(command, "/ready", {"PYTHONPATH": path, "POSTERIOR_CACHE": cache}, checkout)


Measured = dict[str, dict[str, list[float]]]


async def measure(urls: dict[str, str], texts: list[str], runs: int, at_once: int) -> Measured:
    """Of each measure and each server a number a run."""
    found: Measured = defaultdict(lambda: defaultdict(list))
    names = list(urls)
    prompts = iter(texts)
    limits = httpx.Limits(max_connections=2 * at_once)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        for run in range(-1, runs):  # the first one warms up
            several, single, asked = ([next(prompts) for _ in range(at_once)] for _ in range(3))
            for name in names if run % 2 else reversed(names):
                values = {
                    "rate": await rate(client, urls[name], several),
                    "first token": await first_token(client, urls[name], single),
                    "decisions": await decisions(client, urls[name], asked),
                }
                for measured, value in values.items():
                    if run >= 0:
                        found[measured][name].append(value)
    return found


async def rate(client: httpx.AsyncClient, url: str, texts: list[str]) -> float:
    """Tokens a second of texts that are written at once."""
    start = time.perf_counter()
    written = await asyncio.gather(*(_text(client, url, text) for text in texts))
    return sum(written) / (time.perf_counter() - start)


async def _text(client: httpx.AsyncClient, url: str, text: str) -> int:
    body = {"model": MODEL, "prompt": text, "max_tokens": TOKENS, "temperature": 0}
    reply = (await client.post(f"{url}/v1/completions", json=body)).raise_for_status().json()
    return int(reply["usage"]["completion_tokens"])


async def first_token(client: httpx.AsyncClient, url: str, texts: list[str]) -> float:
    """Milliseconds from a request to the first event of its stream, the median of texts one after the other."""
    found = []
    for text in texts:
        body = {"model": MODEL, "prompt": text, "max_tokens": 2, "temperature": 0, "stream": True}
        start = time.perf_counter()
        async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            reply.raise_for_status()
            seen = False
            async for line in reply.aiter_lines():
                if not seen and line.startswith("data: {"):
                    found.append(1000 * (time.perf_counter() - start))
                    seen = True
    return statistics.median(found)


async def decisions(client: httpx.AsyncClient, url: str, texts: list[str]) -> float:
    """Questions a second of inputs that are asked at once."""
    start = time.perf_counter()
    await asyncio.gather(*(_decision(client, url, text) for text in texts))
    return len(texts) / (time.perf_counter() - start)


async def _decision(client: httpx.AsyncClient, url: str, text: str) -> None:
    body = {"model": MODEL, "input": text, "questions": [QUESTION]}
    (await client.post(f"{url}/v1/decisions", json=body)).raise_for_status()


def report(found: Measured) -> str:
    """The table: what each server does, and how this one compares."""
    rows = [["measure", "before", "now", "now / before", "now - before", "target"]]
    for name, each in found.items():
        pairs = list(zip(each["now"], each["before"], strict=True))
        ratios, differences = [a / b for a, b in pairs], [a - b for a, b in pairs]
        rows.append(
            [
                name,
                f"{statistics.median(each['before']):.1f}",
                f"{statistics.median(each['now']):.1f}",
                spread(ratios),
                spread(differences),
                TARGETS[name],
            ]
        )
    return markdown_rows(rows)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
