"""kill -9 at random moments of `fit`, `import`, `calibrate` and of a server that fills its cache of draws.

    CRASHES=200 python -m tests.crash          (make crash; the tests run 20)

After each kill the folder that was written is the old or the new one, the cache holds nothing but whole draws, and
whatever else lies beside them is as it was. In the end every command runs once more, and leaves nothing over.
A program of its own, because it forks: children start in milliseconds, with everything imported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from posterior.calibration import metrics
from posterior.cli import calibrate, fit, imported
from posterior.errors import PosteriorError
from posterior.models.base import Base, resolve
from posterior.storage import artefact, draws
from server.services import registry
from tests.killing import killed_at, leftovers, snapshot
from tests.posterior.conftest import save_tiny_base

LONG = 120  # seconds, many times what a command needs here
FORMAT_1 = Path(__file__).parent / "posterior" / "format1"


@dataclass(frozen=True)
class Victim:
    """A command in two variants, 0 and 1. state: what it has left so far; reset: done before it runs."""

    name: str
    run: Callable[[int], object]
    state: Callable[[], Any]
    reset: Callable[[], object] = lambda: None


class Place:
    """The folders that are written, and what belongs to others."""

    def __init__(self, root: Path):
        self.root, self.out, self.cache = root, root / "posteriors", root / "cache" / "draws"
        self.base = resolve(str(save_tiny_base(root / "tiny-llama")), cache=root / "hashes")
        rows = [{"text": f"{('bad', 'good')[i % 2]} thing {i}", "label": (i % 2) ^ (i % 7 == 0)} for i in range(80)]
        self.train, self.held = self._rows("train", rows[:12]), self._rows("held", rows[20:])
        self.out.mkdir()
        shutil.copytree(FORMAT_1 / "mood", self.out / "mood")
        others = (
            "posteriors/.fitted.mine",
            "posteriors/fitted.checkpoint",
            "cache/adapters/0123-k8-s0",
            "cache/draws/x",
        )
        for name in others:
            (root / name).mkdir(parents=True)
            (root / name / "mine.txt").write_text("mine")
        (self.out / ".imported.txt").write_text("mine")
        self.bystanders = [self.out / "mood", *(root / name for name in others)]

    def _rows(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path = self.root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def call(self, module: Any, *words: object) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        return parser.parse_args([str(word) for word in (*words, "--base", self.base.path)])

    def fit(self, turn: int) -> None:
        task = ("--template", "{text}:", "--answers", "p", "n")
        options = ("--method", "ensemble", "--particles", 2, "--rank", 2, "--epochs", 2, "--seed", turn)
        fit.call(self.call(fit, self.train, "--out", self.out / "fitted", *task, *options))

    def collect(self, turn: int) -> None:
        adapters = [self.out / "mood" / "map", FORMAT_1 / "gang" / "particles" / f"{turn:03d}"]
        task = ("--template", "{text}:", "--answers", "p", "n")
        imported.call(self.call(imported, *adapters, "--out", self.out / "imported", *task))

    def calibrate(self, turn: int) -> None:
        options = ("--predictive", "map", "--dtype", "float32", "--method", ("temperature", "platt")[turn])
        calibrate.call(self.call(calibrate, self.out / "calibrated", self.held, *options))

    def serve(self, turn: int) -> None:
        """What a server does before it starts vLLM."""
        mood = artefact.load(self.out / "mood")
        base = Base(self.base.path, self.base.id, None, mood.base["hash"])
        registry.load(self.root / "served", base, particles=6 + turn, cache=self.root / "cache")

    def hash(self, name: str) -> str | None:
        folder = self.out / name
        with contextlib.suppress(PosteriorError):
            return artefact.load(folder).hash
        return f"damaged: {folder}" if os.path.lexists(folder) else None

    def records(self) -> list[str]:
        return [one.calibrator.method for one in artefact.load(self.out / "calibrated").calibration.values()]

    def drawn(self) -> list[str]:
        """The draws in the cache, by their number: all of them whole."""
        entries = [path for path, _ in draws._entries(self.cache)]
        return [path.name[-1] if draws._use(path) else f"damaged: {path}" for path in entries]

    def forget(self) -> None:
        for path, _ in list(draws._entries(self.cache)):
            shutil.rmtree(path)


def victims(place: Place) -> list[Victim]:
    shutil.copytree(place.out / "mood", place.out / "calibrated", ignore=shutil.ignore_patterns("calibration"))
    (place.root / "served").mkdir()
    shutil.copytree(place.out / "mood", place.root / "served" / "mood")
    return [
        Victim("fit", place.fit, lambda: place.hash("fitted")),
        Victim("import", place.collect, lambda: place.hash("imported")),
        Victim("calibrate", place.calibrate, place.records),
        Victim("serve", place.serve, place.drawn, place.forget),
    ]


def crash(place: Place, kills: int, seed: int) -> dict[str, list[bool]]:
    """By command, of each kill whether the new state was there. Raises AssertionError where any other is."""
    chance, every = random.Random(seed), victims(place)
    took: dict[str, float] = {}
    states: dict[str, list[Any]] = {victim.name: [] for victim in every}
    for victim, turn in product(every, (0, 1)):
        victim.reset()
        start = time.monotonic()
        finish(victim, turn)
        took[victim.name] = time.monotonic() - start
        states[victim.name].append(victim.state())
    kept, found = snapshot(*place.bystanders), {victim.name: list[bool]() for victim in every}
    for victim in cycle(every):
        if sum(map(len, found.values())) == kills:
            break
        victim.reset()
        before = victim.state()
        turn = int(before == states[victim.name][0])  # the variant that is not there yet
        moment, new = chance.uniform(0, took[victim.name]), states[victim.name][turn]
        killed = killed_at(moment, partial(victim.run, turn))
        after = victim.state()
        if after not in ((before, new) if killed else (new,)):
            raise AssertionError(f"{victim.name}, killed after {moment:.3f} s: {after}, neither {before} nor {new}")
        if snapshot(*place.bystanders) != kept:
            raise AssertionError(f"{victim.name}, killed after {moment:.3f} s: something else was touched")
        if killed:
            found[victim.name].append(after == new)
    for victim, turn in product(every, (0, 1)):
        finish(victim, turn)
    if left := leftovers(place.root):
        raise AssertionError(f"left over: {left}")
    return found


def finish(victim: Victim, turn: int) -> None:
    if killed_at(LONG, lambda: victim.run(turn)):
        raise AssertionError(f"{victim.name} did not end in {LONG} s")


def main() -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not be there in children
    tqdm.set_lock(threading.RLock())  # its own is shared with children, and stays locked where one is killed
    tqdm.monitor_interval = 0
    metrics.RESAMPLES = 20  # else nearly all of a calibration is its intervals, and few kills hit what it writes
    kills = int(os.environ.get("CRASHES", 200))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = crash(Place(Path(folder)), kills, seed=kills)
    print("| command | kills | of which found the new state |\n|---|---|---|")
    for name, done in found.items():
        print(f"| {name} | {len(done)} | {sum(done)} |")


if __name__ == "__main__":
    main()
