"""Every step of every write: kill the writer after it, and look at what is there. Prints how many steps each has.

A program of its own, because it forks: `python -m tests.posterior.storage.steps FOLDER`.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from posterior.calibration import records
from posterior.calibration.conformal import Conformal
from posterior.calibration.metrics import Estimate
from posterior.calibration.records import Key, Record
from posterior.calibration.scalers import Temperature
from posterior.errors import PosteriorError
from posterior.files import atomic
from posterior.laplace import blockwise
from posterior.models import lora
from posterior.storage import artefact, draws
from posterior.storage.artefact import Posterior
from tests.killing import killed_after, leftovers, snapshot, together

TORCH = f"torch{'.'.join(torch.__version__.split('.')[:2])}"
FORMAT_1 = Path(__file__).parents[1] / "format1"


def write(target: Path, source: Posterior, shift: float = 0.0) -> Posterior:
    """A posterior of format 2 like `source`, its mean moved."""
    mean = {name: value + shift for name, value in lora.read_adapter(source.map_dir).items()}
    return artefact.save(
        target, family="laplace", base=source.base, task=source.task, lora_config=lora.read_config(source.map_dir),
        prior=source.prior, fit=source.fit, mean=mean, curvature=source.curvature, precision=source.precision,
        width=source.width,
    )  # fmt: skip


def record(posterior: Posterior, temperature: float) -> Record:
    key = Key(
        base=posterior.base["hash"], posterior=posterior.hash, template=records.template_hash(posterior.task),
        predictive="map", particles=1, dtype="float32",
    )  # fmt: skip
    one, scores = {"nll": Estimate(0.5, 0.4, 0.6)}, tuple(i / 100 for i in range(1, 101))
    return Record(
        key=key, calibrator=Temperature(temperature=temperature), conformal=Conformal(score="lac", scores=scores),
        n=100, data="", before=one, after=one, coverage=0.9, sets=one,
    )  # fmt: skip


def steps(work: Path, before: Callable[[], Any], change: Callable[[], Any], state: Callable[[], Any]) -> int:
    """How many steps `change` has. After each, what `state` sees is what it was or what it is to be, whatever else is
    in `work` is as it was, and in the end nothing is left over."""
    bystanders = work / "others"
    shutil.rmtree(work, ignore_errors=True)
    for name in (".tiny.old", "tiny.posterior-work", ".posterior-work", ".tiny.posterior-works/old"):
        (bystanders / name).mkdir(parents=True)
        (bystanders / name / "mine.txt").write_text("mine")
    shutil.copytree(bystanders, work, dirs_exist_ok=True)
    before()
    kept, old = snapshot(bystanders), state()
    change()
    new, seen = state(), set()
    if old == new:
        raise AssertionError("nothing changes")
    for step in range(1, 10_000):
        before()
        killed = killed_after(step, change)
        found = state()
        if found not in (old, new):
            raise AssertionError(f"after step {step}: {found}, neither {old} nor {new}")
        seen.add(json.dumps(found))
        here = {name: digest for name, digest in snapshot(work).items() if name.endswith("mine.txt")}
        if snapshot(bystanders) != kept or len(here) != 2 * len(kept):
            raise AssertionError(f"after step {step}: something else was touched")
        if not killed:
            change()
            if len(seen) != 2 or leftovers(work):
                raise AssertionError(f"saw {seen}, left {leftovers(work)}")
            return step
    raise AssertionError("it never ends")


def hash_of(folder: Path) -> str | None:
    try:
        return artefact.load(folder).hash
    except PosteriorError:
        return None if not folder.exists() else f"damaged: {folder}"


def no_exchange(first: Path, second: Path) -> None:
    raise OSError(errno.EINVAL, "Invalid argument")


def main(work: Path) -> dict[str, int]:
    torch.set_num_threads(1)
    source = artefact.load(FORMAT_1 / "mood")
    target, template = work / "tiny", work.with_name("template")
    write(template, source)

    def fresh() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(template, target)

    def fresh_cache() -> None:
        shutil.rmtree(work / "draws", ignore_errors=True)

    def drawn() -> list[str]:
        return sorted(path.name if draws._use(path) else "damaged" for path, _ in draws._entries(work / "draws"))

    def records() -> list[float]:
        return [one.calibrator.temperature for one in artefact.load(target).calibration.values()]  # type: ignore[union-attr]

    replace = partial(write, target, source, 0.5)
    found = {
        "new": steps(work, lambda: shutil.rmtree(target, ignore_errors=True), replace, lambda: hash_of(target)),
        "replace": steps(work, fresh, replace, lambda: hash_of(target)),
        "calibrate": steps(work, fresh, lambda: artefact.load(target).add(record(artefact.load(target), 2.0)), records),
        "draws": steps(work, fresh_cache, lambda: source.adapters(2, work / "draws"), drawn),
    }
    fresh_cache()
    together(4, lambda: source.adapters(2, work / "draws"))
    if drawn() != [f"{source.hash[:16]}-s0-v{blockwise.SAMPLER}.{TORCH}-k2"]:
        raise AssertionError(f"servers that start together made {drawn()}")
    atomic.exchange = no_exchange
    return found | {"two renames": steps(work, fresh, replace, lambda: hash_of(target))}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
