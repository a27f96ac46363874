"""A fault of its own kind, and a soak: posteriors are loaded, moved and unloaded every few seconds under many clients.

    python -m tests.server.reloading --minutes 30 --clients 16 --every 5      (`make reload`)

It starts a server of the default base's first layers (--whole: all of them) in float32. The folder "swap" holds two
fits in turn. Clients ask for "swap", for the alias "live" and for "steady", which stays: choices, decisions, texts,
streams and samples. They report outcomes, some leave, and the metrics are scraped. Nothing may go wrong: every answer
is that of the posterior which it names, text too, every outcome is stored, and no status is anything but 200, the 404
of a model that is not loaded, and 429. At the end the server holds the adapters that it held at the start, and no
request. Memory and open files are printed every minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from posterior.models.base import Base, resolve
from posterior.storage.artefact import Posterior
from tests.server import folders
from tests.server.running import KEY, launched

INPUTS = [{"text": text} for text in ("Good.", "I left hungry after an hour.", "so so", "The best of all places!")]
PROMPT = "It was"
MODELS = ("swap", "live", "steady")
KINDS = ("choice", "decision", "text", "stream", "samples")
QUESTION = {"type": "choice", "instructions": "How?", "choices": [{"value": "glad"}, {"value": "cross"}]}
ALLOWED = {200, 404, 429}
CLOSE = 2e-3  # of a probability: between a batch and another


@dataclass
class Report:
    """What happened. wrong: in words; statuses: how many answers of each; changes: of what is loaded."""

    wrong: list[str] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    changes: int = 0
    outcomes: int = 0
    grown: float = 0.0  # MiB of all processes, over the second half
    opened: int = 0  # files of all processes, over the second half
    longest: float = 0.0  # seconds for one answer

    def __str__(self) -> str:
        counts = ", ".join(f"{n} x {status}" for status, n in sorted(self.statuses.items()))
        asked = ", ".join(f"{n} by {label}" for label, n in sorted(self.models.items()))
        return (
            f"{self.changes} changes; answers: {counts} ({asked}); the longest took {self.longest:.1f} s; "
            f"{self.outcomes} outcomes; over the second half memory {self.grown:+.0f} MiB, open files {self.opened:+d};"
            f" wrong: {len(self.wrong)}"
        )


@dataclass
class Crowd:
    """Clients of a server at `url`, and the admin who changes what is loaded from the two fits in `fits`."""

    url: str
    root: Path
    fits: list[Posterior]
    report: Report = field(default_factory=Report)
    expected: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    stop: bool = False

    def __post_init__(self) -> None:
        limits = httpx.Limits(max_connections=None)
        headers = {"Authorization": f"Bearer {KEY}"}
        self.http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120, limits=limits)

    async def run(self, seconds: float, clients: int, every: float) -> Report:
        """Everything, for so long."""
        await self._learn()
        before = await self._settled()
        asking = [asyncio.create_task(self._client(random.Random(number))) for number in range(clients)]
        asking.append(asyncio.create_task(self._scrape()))
        start, sizes = time.monotonic(), [size()]
        while (passed := time.monotonic() - start) < seconds and not self.report.wrong:
            if passed > len(sizes) * min(60, seconds / 4):
                sizes.append(size())
                print(f"{passed:.0f} s: {', '.join(f'{n} {m:.0f} MiB' for n, m in memory().items())}", flush=True)
            await self._change()
            await asyncio.sleep(every)
        half, end = sizes[len(sizes) // 2], size()
        self.report.grown, self.report.opened = end[0] - half[0], end[1] - half[1]
        self.stop = True
        await asyncio.gather(*asking)
        if (after := await self._settled()) != before:
            self.report.wrong.append(f"{after} adapters are left, and there were {before}")
        await self.http.aclose()
        return self.report

    async def _learn(self) -> None:
        """What each posterior answers while nobody else asks."""
        for number in (1, 0):
            self._put(number)
            label = await self._load()
            for kind in KINDS:
                await self._ask(label, kind, learn=True)
            if number:
                await self._admin("DELETE", f"/v1/posteriors/{label}")
        await self._admin("PUT", "/v1/aliases/live", {"posterior": label})
        for kind in KINDS:
            await self._ask("steady", kind, learn=True)

    async def _change(self) -> None:
        """The other fit is loaded, the alias moves to it and the first one goes; now and then both are gone."""
        number = self.report.changes = self.report.changes + 1
        old = (await self._admin("GET", "/v1/aliases"))["data"][0]["posterior"]
        self._put(number % 2)
        if number % 3 == 0:
            await self._admin("PUT", "/v1/aliases/live", {"posterior": "steady"})
            await self._admin("DELETE", f"/v1/posteriors/{old}")
            await asyncio.sleep(0.3)
            new = await self._load()
        else:
            new = await self._load()
            if new != old:
                await self._admin("PUT", "/v1/aliases/live", {"posterior": new})
                await self._admin("DELETE", f"/v1/posteriors/{old}")
        await self._admin("PUT", "/v1/aliases/live", {"posterior": new})

    def _put(self, number: int) -> None:
        """The folder "swap" becomes one of the fits."""
        shutil.copytree(self.fits[number].path, self.root / ".swap")
        shutil.rmtree(self.root / "swap", ignore_errors=True)
        (self.root / ".swap").rename(self.root / "swap")

    async def _load(self) -> str:
        return str((await self._admin("POST", "/v1/posteriors", {"name": "swap"}))["id"])

    async def _admin(self, method: str, path: str, body: Any = None) -> Any:
        reply = await self.http.request(method, path, json=body)
        if reply.status_code != 200:
            self.report.wrong.append(f"{method} {path} {body}: {reply.status_code} {reply.text}")
        return reply.json()

    async def _client(self, rng: random.Random) -> None:
        while not self.stop:
            model, kind = rng.choice(MODELS), rng.choice(KINDS)
            start = time.monotonic()
            try:
                if rng.random() < 0.05:  # one that leaves
                    await asyncio.wait_for(self._ask(model, kind), rng.uniform(0.01, 0.5))
                else:
                    await self._ask(model, kind)
            except TimeoutError:
                continue
            except httpx.HTTPError as error:
                self.report.wrong.append(f"{model} {kind}: {error!r}")
            self.report.longest = max(self.report.longest, time.monotonic() - start)

    async def _ask(self, model: str, kind: str, *, learn: bool = False) -> None:
        """One question, and whether its answer is that of the posterior which it names."""
        path, body = _request(kind)
        reply = await self.http.post(path, json=body | {"model": model})
        self.report.statuses[reply.status_code] += 1
        if reply.status_code != 200:
            if reply.status_code not in ALLOWED or learn:
                self.report.wrong.append(f"{model} {kind}: {reply.status_code} {reply.text[:500]}")
            return
        id, label, found = _read(kind, reply)
        self.report.models[label] += 1
        key = (label, "text" if kind == "stream" else kind)
        if learn:
            self.expected[key] = found
        elif key not in self.expected or _far(found, self.expected[key]):
            self.report.wrong.append(f"{model} {kind} by {label}: {found}, expected {self.expected.get(key)}")
        if not learn and self.report.statuses[200] % 4 == 0:
            await self._report(id)

    async def _report(self, id: str) -> None:
        """An outcome of an answer, which must be stored."""
        reply = await self.http.post("/v1/outcomes", json={"id": id, "index": 0, "correct": True})
        if reply.status_code != 200 or reply.json()["data"][0]["status"] != "stored":
            self.report.wrong.append(f"outcome of {id}: {reply.status_code} {reply.text}")
        self.report.outcomes += 1

    async def _scrape(self) -> None:
        """The metrics, as Prometheus asks for them."""
        while not self.stop:
            if (reply := await self.http.get("/metrics")).status_code != 200:
                self.report.wrong.append(f"/metrics: {reply.status_code} {reply.text[:500]}")
            await asyncio.sleep(5)

    async def _settled(self) -> int:
        """How many adapters there are, once what was unloaded is forgotten, or has not been for long."""
        for _ in range(100):
            listed = await self._admin("GET", "/v1/posteriors")
            if all(card["state"] == "loaded" for card in listed["data"]):
                break
            await asyncio.sleep(0.2)
        return int(listed["room"]["adapters"])


def _request(kind: str) -> tuple[str, dict[str, Any]]:
    """The path and body of a request, without its model."""
    if kind == "choice":
        return "/v1/predictive", {"inputs": INPUTS, "predictive": "mixture"}
    if kind == "decision":
        question = {"input": INPUTS[0]["text"], "questions": [QUESTION]}
        return "/v1/decisions", question | {"uncertainty": {"predictive": "mixture"}}
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": kind == "stream"}
    return "/v1/completions", body | ({"uncertainty": {"samples": 3, "return": "greedy"}} if kind == "samples" else {})


def _read(kind: str, reply: httpx.Response) -> tuple[str, str, list[float]]:
    """The id, the posterior that an answer names, and its numbers: probabilities, or a text as its log-probability."""
    if kind == "stream":
        chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
        if any("error" in chunk for chunk in chunks):
            return "", "an error", []
        said = [choice["uncertainty"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]][-1]
        return chunks[0]["id"], said["posterior"], [said["logprob"]]
    whole = reply.json()
    if kind == "choice":
        numbers = [answer["probability"] for item in whole["data"] for answer in item["answers"]]
        return whole["id"], whole["posterior"], numbers
    if kind == "decision":
        (answer,) = whole["answers"]
        numbers = [each["probability"] for each in answer["probabilities"]]
        return whole["id"], answer["uncertainty"]["posterior"], numbers
    said = whole["choices"][0]["uncertainty"]
    return whole["id"], said["posterior"], [said["logprob"]]


def _far(found: list[float], expected: list[float]) -> bool:
    bounds = [CLOSE * max(1.0, abs(each)) for each in expected]
    return len(found) != len(expected) or any(
        abs(a - b) > bound for a, b, bound in zip(found, expected, bounds, strict=True)
    )


def size() -> tuple[float, int]:
    """MiB and open files of the processes that this one has started."""
    every = psutil.Process().children(recursive=True)
    return sum(memory().values()), sum(each.num_fds() for each in every)


def memory() -> dict[str, float]:
    """MiB of each of them."""
    every = psutil.Process().children(recursive=True)
    return {f"{each.name()} {number}": each.memory_info().rss / 2**20 for number, each in enumerate(every)}


def reload(folder: Path, base: Base, seconds: float, clients: int, every: float) -> Report:
    """Start a server in `folder`, and do all that to it."""
    root = folder / "posteriors"
    root.mkdir()
    fits = [folders.particles(folder, base, name=name, seed=seed) for name, seed in (("a", 100), ("b", 200))]
    folders.particles(root, base, name="steady")
    with launched(folder, base, "--dtype", "float32") as (url, _):
        return asyncio.run(Crowd(url, root, fits).run(seconds, clients, every))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between changes")
    parser.add_argument("--whole", action="store_true", help="the whole base, not its first layers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        base = resolve() if args.whole else folders.cut_base(Path(name))
        report = reload(Path(name), base, 60 * args.minutes, args.clients, args.every)
    print(report, *report.wrong[:20], sep="\n", flush=True)
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
