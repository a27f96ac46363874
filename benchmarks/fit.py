"""What do fits cost, and how close is the curvature? Everything as a ratio to other work of the same model on the same
rows.

    .venv-oracles/bin/python -m benchmarks.fit      the shipped posterior's adapter and the Yelp training rows

Four tables (--tables): the curvature and the linearised predictive against passes over the rows; Laplace against
laplace-torch and bayesian-lora (benchmarks/rivals.py; `make oracles` makes the environment that has them); an epoch of
SVGD's K particles against K epochs of MAP, one after the other; answers of several tokens that share their prompt's row
against a row for each.

Time: repetitions take turns, so that a machine that slows down slows all of them; ratios are of the same repetition,
quoted as median [min, max]. Memory: peak resident size of a process of its own for each job (on CUDA: the allocator's
peak). Closeness: relative Frobenius distance of each Kronecker block to the exact GGN block, from per-example
Jacobians, without ever forming a block; and of the predictive variances on other rows to those of the exact GGN of all
parameters together.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.rivals import WAYS, dense, gradients
from posterior.curvature import kfac
from posterior.curvature.sketch import Sketch
from posterior.data import candidates
from posterior.data.examples import Batch, Examples, batches, encode
from posterior.data.reading import read_rows
from posterior.laplace.linearized import moments
from posterior.likelihood.scores import scores
from posterior.likelihood.stacked import stack, stacked
from posterior.models import lora
from posterior.models.base import load_model, load_tokenizer, resolve
from posterior.particles import svgd
from posterior.storage import artefact
from posterior.training.map import Trainer, Training
from posterior.training.method import PRECISION
from posterior.training.prior import prior_precision
from server.configuration.schema import SHIPPED

DATA = Path(__file__).parent / "data" / "yelp.train.jsonl"
PARTICLES = 8
ANSWERS = (" a place to avoid", " not worth the money", " about what one expects", " the best in town by far")


class Bench:
    """The model with the posterior's adapter, and the jobs to compare."""

    def __init__(self, args: argparse.Namespace):
        posterior = artefact.load(args.posterior)
        base = resolve(args.base)
        self.tokenizer: Any = load_tokenizer(base)
        rows = encode(posterior.task, self.tokenizer, read_rows(args.data)[: args.rows + args.asked])
        self.examples, self.asked = rows[: args.rows], rows[args.rows :]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = lora.load_peft(load_model(base, getattr(torch, args.dtype), self.device), posterior.map_dir)
        self.model.eval().requires_grad_(False)
        self.posterior, self.size = posterior, args.batch_size

    def batches(self, examples: Examples | None = None) -> list[Batch]:
        return [batch.to(self.device) for _, batch in batches(examples or self.examples, self.size)]

    def epoch(self) -> None:
        """One epoch of forward + backward + Adam, in the same batches of like length that the factors see."""
        trainer = Trainer(
            self.model, self.examples, dict.fromkeys(lora.matrices(self.model), 1.0), Training(1e-12, epochs=9)
        )
        trainer.model.train()
        for module in trainer.matrices.values():
            module.weight.requires_grad_(True)
        for batch in self.batches():
            trainer.update(batch)
        self.model.eval().requires_grad_(False)

    def factors(self) -> None:
        kfac.fit(self.model, lora.matrices(self.model), self.batches())

    def low_rank_factors(self) -> None:
        """What `posterior fit` does by default: rank 32, and the sketch of the whole Fisher in the same pass."""
        matrices = lora.matrices(self.model)
        kfac.fit(self.model, matrices, self.batches(), rank=32, sketch=Sketch(matrices, {}))

    def forwards(self) -> None:
        """C + 1 forward passes of every batch."""
        with torch.no_grad():
            for batch in self.batches():
                for _ in range(len(self.examples[0].continuations) + 1):
                    scores(self.model, batch)

    def particles_together(self) -> None:
        """An epoch of SVGD."""
        origin = lora.get(self.model)
        precision = prior_precision(origin, PRECISION)
        start = stack([svgd.draw(origin, precision, seed) for seed in range(PARTICLES)])
        with stacked(self.model, start):
            svgd.SvgdTrainer(self.model, self.examples, precision, Training(epochs=9), origin).run_epoch()

    def particles_apart(self) -> None:
        """As many epochs of MAP as particles."""
        origin = lora.get(self.model)
        for seed in range(PARTICLES):
            precision = prior_precision(origin, PRECISION)
            Trainer(self.model, self.examples, precision, Training(epochs=9, seed=seed)).run_epoch()
            lora.put(self.model, origin)

    def linearised(self) -> None:
        matrices = lora.matrices(self.model)
        for batch in self.batches():
            moments(self.model, matrices, self.posterior.covariance, batch)

    def questions(self) -> Bench:
        """The same rows with four answers of several tokens."""
        bench, answers = copy.copy(self), candidates.encode(self.tokenizer, ANSWERS)
        bench.examples = Examples([replace(row, continuations=answers) for row in self.examples])
        return bench

    def epoch_apart(self) -> None:
        """With a row for each answer."""
        with mock.patch("posterior.likelihood.scores.BRANCHING", frozenset()):
            self.epoch()

    def linearised_apart(self) -> None:
        with mock.patch("posterior.likelihood.scores.BRANCHING", frozenset()):
            self.linearised()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, default=SHIPPED / "sentiment")
    parser.add_argument("--base")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--asked", type=int, default=32, help="other rows, whose predictive is compared with rivals")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    args = parser.parse_args()
    bench = Bench(args)
    answers = len(bench.examples[0].continuations)
    print(f"{len(bench.examples)} rows, {answers} candidates, batches of {args.batch_size}, {args.dtype}\n")
    for table in args.tables:
        TABLES[table](bench, args)


def curvature(bench: Bench, args: argparse.Namespace) -> None:
    answers = len(bench.examples[0].continuations)
    times = measure(bench, ("epoch", "factors", "low_rank_factors", "forwards", "linearised"), args.repetitions)
    peaks = {name: peak_memory(name, args) for name in ("epoch", "factors", "low_rank_factors")}
    print("| job | seconds (median) | ratio of times | ratio of peak memory | target |\n|---|---|---|---|---|")
    rows = [
        ("Kronecker factors / epoch", "factors", "epoch", "<= 1.5"),
        ("Kronecker factors, rank 32, and sketch / epoch", "low_rank_factors", "epoch", "<= 1.5"),
        (f"linearised predictive / {answers + 1} forwards", "linearised", "forwards", "<= 1.3"),
    ]
    for label, job, reference, target in rows:
        memory = f"{peaks[job] / peaks[reference]:.2f}" if job in peaks else ""
        seconds = f"{statistics.median(times[job]):.2f}"
        print(f"| {label} | {seconds} | {ratio(times[job], times[reference])} | {memory} | {target} |")
    print("\n| Kronecker factors | relative Frobenius distance to the exact blocks: A | B |\n|---|---|---|")
    for label, options in (("expand", {}), ("reduce", {"sharing": "reduce"}), ("expand, rank 32", {"rank": 32})):
        near = closeness(bench, options)
        print(f"| {label} | {near['A']:.3f} | {near['B']:.3f} |")


def rivals(bench: Bench, args: argparse.Namespace) -> None:
    """Ours, laplace-torch and bayesian-lora: seconds of the curvature and of the predictive; distance to the dense
    answer."""
    precision = max(bench.posterior.precision[name] for name in bench.posterior.precision if name.endswith(".B"))
    ways = {name: make(bench.model, precision) for name, make in WAYS.items()}
    rows, asked = bench.batches(), bench.batches(bench.asked)
    exact = torch.cat(dense(bench.model, precision, rows, asked)).cpu()
    spent: dict[str, dict[str, list[float]]] = {name: {"fit": [], "predict": [], "both": []} for name in ways}
    found: dict[str, torch.Tensor] = {}
    for _ in range(args.repetitions):
        for name, way in ways.items():
            start = time.perf_counter()
            way.fit(rows)
            middle = time.perf_counter()
            found[name] = torch.cat([way.variance(batch).cpu() for batch in asked])
            end = time.perf_counter()
            for part, took in {"fit": middle - start, "predict": end - middle, "both": end - start}.items():
                spent[name][part].append(took)
    print(f"\nPrior precision {precision:.1f} of all matrices; the predictive variances of {len(exact)} other rows:\n")
    head = [
        "Laplace",
        "curvature, s",
        "/ the first",
        "predictive, s",
        "/ the first",
        "both / the first",
        "distance to the dense answer",
    ]
    print(f"| {' | '.join(head)} | mean of log(variance / dense) |\n|{'---|' * (len(head) + 1)}")
    first = next(iter(spent))
    for name, seconds in spent.items():
        cells = []
        for part in ("fit", "predict"):
            cells += [f"{statistics.median(seconds[part]):.2f}", ratio(seconds[part], spent[first][part])]
        cells.append(ratio(seconds["both"], spent[first]["both"]))
        cells.append(f"{float((found[name] - exact).norm() / exact.norm()):.3f}")
        cells.append(f"{float((found[name] / exact).log().mean()):+.2f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def together(bench: Bench, args: argparse.Namespace) -> None:
    """SVGD's particles in one forward pass against MAP runs one by one."""
    times = measure(bench, ("particles_together", "particles_apart"), args.repetitions)
    peaks = {name: peak_memory(name, args) for name in ("epoch", "particles_together")}
    took = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"\n| K = {PARTICLES} | seconds | ratio of times | ratio of peak memory | target |\n|---|---|---|---|---|")
    print(
        f"| an epoch of SVGD / {PARTICLES} epochs of MAP | {took['particles_together']:.1f} / "
        f"{took['particles_apart']:.1f} | {ratio(times['particles_together'], times['particles_apart'])} | "
        f"{peaks['particles_together'] / peaks['epoch']:.2f} | <= 0.7, <= 1.5 |"
    )


def questions(bench: Bench, args: argparse.Namespace) -> None:
    """A prompt once for all its answers against once for each."""
    bench = bench.questions()
    times = measure(bench, ("epoch", "epoch_apart", "linearised", "linearised_apart"), args.repetitions)
    lengths = [len(tokens) for tokens in bench.examples[0].continuations]
    prompt = statistics.mean(len(row.prompt) for row in bench.examples)
    print(f"\nPrompts of {prompt:.0f} tokens, {len(lengths)} answers of {statistics.mean(lengths):.1f}:\n")
    print("| one row for a question / a row for each answer | seconds | ratio of times |\n|---|---|---|")
    for label, job in (("an epoch of MAP", "epoch"), ("linearised predictive", "linearised")):
        one, apart = times[job], times[f"{job}_apart"]
        print(f"| {label} | {statistics.median(one):.1f} / {statistics.median(apart):.1f} | {ratio(one, apart)} |")


TABLES = {"curvature": curvature, "rivals": rivals, "together": together, "questions": questions}


def measure(bench: Bench, names: Sequence[str], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each job in each repetition, after one warm-up, in turns."""
    jobs: dict[str, Callable[[], None]] = {name: getattr(bench, name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repetition in range(repetitions + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if bench.device == "cuda":
                torch.cuda.synchronize()
            if repetition:
                times[name].append(time.perf_counter() - start)
    return times


def peak_memory(job: str, args: argparse.Namespace) -> float:
    """Peak memory in bytes of a fresh process that loads the model and does one job."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (job, args))


def _peak(job: str, args: argparse.Namespace) -> float:
    bench = Bench(args)
    getattr(bench, job)()
    if bench.device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def ratio(a: Sequence[float], b: Sequence[float]) -> str:
    each = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(each):.2f} [{min(each):.2f}, {max(each):.2f}]"


def closeness(bench: Bench, options: dict[str, Any]) -> dict[str, float]:
    """|H_kronecker - H_exact|_F / |H_exact|_F over all A blocks and over all B blocks.

    With H_exact = sum_m v_m v_m^T: |H_exact|^2 = sum (v_m . v_n)^2, <H_exact, H_kron> = sum v_m^T H_kron v_m.
    """
    blocks = kfac.fit(bench.model, lora.matrices(bench.model), bench.batches(), **options)
    gradients = exact_gradients(bench)
    distance, norm = {"A": 0.0, "B": 0.0}, {"A": 0.0, "B": 0.0}
    for name, block in blocks.items():
        v = gradients[name].double()
        exact = float((v.flatten(1) @ v.flatten(1).T).square().sum())
        kept, rest, multiplicity = (x.double() if isinstance(x, torch.Tensor) else x for x in block.eigenvalues())
        small, large = block.small.basis.double(), block.large.basis.double()
        rotated = small.T @ v
        inside = rotated @ large
        cross = float((inside.square() * kept).sum())
        cross += float(((rotated.square().sum(2) - inside.square().sum(2)) * rest).sum())
        own = float(kept.square().sum()) + multiplicity * float(rest.square().sum())
        distance[name[-1]] += exact - 2 * cross + own
        norm[name[-1]] += exact
    return {side: (distance[side] / norm[side]) ** 0.5 for side in distance}


def exact_gradients(bench: Bench) -> dict[str, torch.Tensor]:
    """v [N (C-1), r, d] of each matrix: the Jacobian times a root of the Fisher, so that H = sum v v^T exactly."""
    parts = [gradients(bench.model, batch, root=True) for batch in bench.batches()]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


if __name__ == "__main__":
    main()
