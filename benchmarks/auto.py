"""What `particles: "auto"` spares, and how far its answers are from those of all particles.

The server is the real one. Rows come in batches of concurrent requests, one a row. Each batch is asked for in both
ways, of which the first is timed, now the one and now the other: the second finds the prompts in vLLM's prefix cache.
The tolerance is the rule's own, which was fixed before any test row was seen. Interval: mean +- t * standard error of
the ratios of neighbouring batches.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from benchmarks.engines import wait_passively
from benchmarks.predictive import interval, ours
from posterior.models import base
from posterior.storage import artefact
from posterior.storage.artefact import Posterior
from server.engine.config import set_environment

DATA = Path(__file__).parent / "data" / "support.test.jsonl"
WAYS: dict[str, dict[str, Any]] = {"all": {}, "auto": {"particles": "auto"}}


class Asked(NamedTuple):
    """The answers' records of a batch in one way, and the seconds that they took."""

    records: list[dict[str, Any]]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, required=True, help="a posterior of decisions or of a choice task")
    parser.add_argument("--base", help="its base model, as for `posterior serve`")
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL of its rows")
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--batch", type=int, default=16, help="concurrent requests")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wait_passively("benchmarks.auto")
    model, posterior = base.resolve(args.base), artefact.load(args.posterior)
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    random.Random(args.seed).shuffle(rows)
    rows = rows[: args.rows + 2 * args.batch]  # two batches warm up
    batches = [rows[start : start + args.batch] for start in range(0, len(rows), args.batch)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_environment(device)
    with tempfile.TemporaryDirectory() as folder, ours(model, posterior, args, Path(folder)) as url:
        found = asyncio.run(measure(url, posterior, batches))
    print(report(found[2:], args, device))


async def measure(url: str, posterior: Posterior, batches: list[list[dict[str, Any]]]) -> list[dict[str, Asked]]:
    """Each batch by way, the one that was measured first."""
    found = []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=256)) as client:
        for index, batch in enumerate(batches):
            names = list(WAYS) if index % 2 == 0 else list(WAYS)[::-1]
            asked = {}
            for name in names:
                start = time.perf_counter()
                records = await asyncio.gather(*(ask(client, posterior, row, WAYS[name]) for row in batch))
                asked[name] = Asked(list(records), time.perf_counter() - start)
            found.append(asked)
    return found


async def ask(
    client: httpx.AsyncClient, posterior: Posterior, row: dict[str, Any], way: dict[str, Any]
) -> dict[str, Any]:
    """The record of a row's answer."""
    options = {"predictive": "mixture", **way}
    if posterior.task.kind == "decision":
        body = {"input": row["input"], "questions": [row["question"]], "uncertainty": options}
        response = await client.post("/v1/decisions", json={"model": posterior.name, **body})
        response.raise_for_status()
        return dict(response.json()["answers"][0]["uncertainty"])
    body = {"inputs": [{field: row[field] for field in posterior.task.fields}], **options}
    response = await client.post("/v1/predictive", json={"model": posterior.name, **body})
    response.raise_for_status()
    return dict(response.json()["data"][0])


def report(found: list[dict[str, Asked]], args: argparse.Namespace, device: str) -> str:
    """Two Markdown tables: what the answers are, and how fast they come."""
    pairs = [pair for asked in found for pair in zip(asked["all"].records, asked["auto"].records, strict=True)]
    variations = torch.tensor([total_variation(*pair) for pair in pairs], dtype=torch.float64)
    stated = torch.tensor([auto["left_out"]["total_variation"] for _, auto in pairs], dtype=torch.float64)
    changed = sum(whole["answer"] != auto["answer"] for whole, auto in pairs) / len(pairs)
    used = [auto["particles"] for _, auto in pairs]
    machine = f"{args.dtype} on {device} ({os.cpu_count()} cores)"
    head = f"{len(pairs)} rows, {machine}, {args.batch} concurrent, seed {args.seed}"
    cells = (
        f"{sum(used) / len(used):.2f}", f"{float(stated.mean()):.4f}", f"{float(variations.mean()):.4f}",
        f"{float(variations.quantile(0.95)):.3f}", f"{float(variations.max()):.3f}", f"{changed:.3f}",
        ", ".join(f"{n}: {count}" for n, count in sorted(Counter(used).items())),
    )  # fmt: skip
    rates = {name: [len(asked[name].records) / asked[name].seconds for asked in found if next(iter(asked)) == name]
             for name in WAYS}  # fmt: skip
    ratios = [auto / whole for whole, auto in zip(*rates.values(), strict=False)]
    return "\n".join(
        [
            head,
            "",
            "| particles, mean | TV stated, mean | TV, mean | TV, 95 % | TV, most | other answer | rows by particles |",
            "|---|---|---|---|---|---|---|",
            f"| {' | '.join(cells)} |",
            "",
            f"| answers/s, {args.particles} particles | answers/s, auto | auto / {args.particles} |",
            "|---|---|---|",
            f"| {interval(rates['all'])} | {interval(rates['auto'])} | {interval(ratios)} |",
        ]
    )


def total_variation(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of two records' probabilities."""
    pairs = zip(one["answers"], other["answers"], strict=True)
    return sum(abs(a["probability"] - b["probability"]) for a, b in pairs) / 2


if __name__ == "__main__":
    main()
