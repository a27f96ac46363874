"""Is this version as fast as an earlier one? Two servers, one of each commit, take turns on the same requests.

    python -m benchmarks.versions --before COMMIT

The earlier commit is checked out into a temporary worktree and runs in this environment, with its own shipped
posterior. Both servers stay up; one works at a time, and who begins alternates. Questions: text of 8 prompts at K = 8
(the case of benchmarks.decode), the mixture of 16 prompts and the linearised predictive of 16 prompts (of
benchmarks.predictive). Printed: the median of each, the median ratio of the pairs (before / now, above 1: now is
faster) and its 95 % interval by a bootstrap.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from scipy import stats

from benchmarks.engines import wait_passively
from benchmarks.predictive import DATA, running

ROOT = Path(__file__).parents[1]
TARGET = 0.97
Ask = Callable[[str, int], None]  # of a server's URL, the run's number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="the earlier commit")
    parser.add_argument("--runs", type=int, default=9, help="of each question and server; the first is not counted")
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    return parser.parse_args()


def main() -> None:
    wait_passively("benchmarks.versions")
    args = arguments()
    with worktree(args.before) as before, server(before) as old, server(ROOT) as new:
        print(f"{args.runs} runs each; before: {args.before}\n")
        print("| question | before, s | now, s | before / now | target |\n|---|---|---|---|---|")
        for name, ask in questions(args.tokens).items():
            print(line(name, *turns(ask, old, new, args.runs)), flush=True)


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


@contextlib.contextmanager
def server(tree: Path) -> Iterator[str]:
    """The URL of `posterior serve` as that tree has it. Its code must be that tree's, wherever the package is
    installed."""
    command = [
        "-m",
        "server.cli",
        "serve",
        "--posteriors",
        str(tree / "posterior/shipped"),
        "--particles",
        "8",
    ]
    with contextlib.chdir(tree), running(command, "/ready", {"PYTHONPATH": str(tree)}) as url:
        yield url


def questions(tokens: int) -> dict[str, Ask]:
    rows = [json.loads(line) for line in DATA.read_text().splitlines()]

    def text(url: str, run: int) -> None:
        prompts = [f"{run} {number}: once upon a time" for number in range(8)]
        body = {"model": "sentiment", "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda prompt: post(f"{url}/v1/completions", body | {"prompt": prompt}), prompts))

    def predictive(name: str) -> Ask:
        def ask(url: str, run: int) -> None:
            inputs = [{"text": f"{run} {row['text']}"[:600]} for row in rows[:16]]
            post(f"{url}/v1/predictive", {"model": "sentiment", "inputs": inputs, "predictive": name})

        return ask

    found = {f"text, 8 prompts, {tokens} tokens, K = 8": text}
    return found | {f"{name}, 16 prompts": predictive(name) for name in ("mixture", "linearized")}


def post(url: str, body: dict[str, Any]) -> None:
    httpx.post(url, json=body, timeout=600).raise_for_status()


def turns(ask: Ask, old: str, new: str, runs: int) -> tuple[list[float], list[float]]:
    """Seconds of each run but the first; every run has prompts of its own, which no prefix cache knows."""
    seconds: dict[str, list[float]] = {old: [], new: []}
    for run in range(runs + 1):
        for url in (old, new) if run % 2 else (new, old):
            start = time.perf_counter()
            ask(url, run)
            seconds[url].append(time.perf_counter() - start)
    return seconds[old][1:], seconds[new][1:]


def line(name: str, old: list[float], new: list[float]) -> str:
    ratios = np.array(old) / np.array(new)
    low, high = stats.bootstrap((ratios,), np.median, method="percentile", rng=0).confidence_interval
    middle = float(np.median(ratios))
    verdict = "met" if middle >= TARGET else "missed"
    return (
        f"| {name} | {np.median(old):.2f} | {np.median(new):.2f} | {middle:.3f} [{low:.3f}, {high:.3f}] | {verdict} |"
    )


if __name__ == "__main__":
    main()
