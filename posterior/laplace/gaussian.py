"""`--method laplace`: MAP or the mean of a variational Gaussian, its curvature, and the prior by the evidence."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from posterior.curvature import kfac
from posterior.curvature.sketch import Full, Sketch
from posterior.data.examples import Example, batches
from posterior.errors import PosteriorError
from posterior.laplace import blockwise, width
from posterior.laplace.linearized import moments
from posterior.models import lora
from posterior.predictive.mixture import from_gaussian
from posterior.training.job import EPOCHS, EVIDENCE, PRECISION, Job, Result, fixed_precision, number, prior_precision
from posterior.training.map import Checkpoint, Trainer, Training

# The evidence must not speak before theta* has seen the data: near B = 0 it finds B hardly moved, and chooses a prior
# so tight that B stays there. Until then B's prior is weak.
BURN_IN = 0.5  # share of the training steps
FIRST_PRECISION = 1.0  # of B, during the burn-in; on yelp and SST-2 the evidence then chooses 4 to 14
WORTH = 1.0  # nats of evidence that other epochs must bring; less is none to speak of (Kass & Raftery 1995)
MOST_EPOCHS = 32  # that the evidence may ask for
HELDOUT_FACTORS: tuple[float, ...] = tuple(2.0 ** (step / 2) for step in range(-12, 21))  # of the evidence's precision


@dataclass(frozen=True)
class Gaussian:
    """The posterior's covariance: P = precision + curvature, the blocks already coupled (see
    posterior/laplace/blockwise.py), or the whole Fisher (`full`) where only scores matter. Matrices that it does not
    name are certain."""

    curvature: dict[str, kfac.Block]
    precision: blockwise.Precision
    coupling: float
    full: Full | None

    @property
    def law(self) -> blockwise.Law:
        return self.full or blockwise.Blocks(self.curvature, self.precision)


def fit(job: Job) -> Result:
    """A Laplace posterior of a new adapter, or of the one that --adapter named."""
    model, examples, args = job.model, job.examples, job.args
    training, evidences = job.training, dict[int, float]()
    if args.adapter:
        origin = foreign_origin(lora.get(model))
        gaussian = around(model, origin, examples, args)
    elif args.epochs == EVIDENCE:
        best, evidences = train_by_evidence(job)
        origin, gaussian, training = best.origin, best.gaussian, replace(training, epochs=best.epochs)
    else:
        origin, gaussian = train(model, examples, args, training, job.checkpoint)
    if args.prior_precision == "heldout":
        gaussian = rescaled(gaussian, heldout_factor(model, gaussian.law, job.heldout, args.batch_size))
    curvature, precision, coupling = gaussian.curvature, gaussian.precision, gaussian.coupling
    drawn = 1.0  # a text's predictive has no linearised twin
    if args.task == "choice":
        drawn = width.fit(model, gaussian.law, curvature, precision, examples, args.batch_size)
    log_lik = job.log_likelihood()
    return Result(
        family="laplace",
        mean=lora.get(model),
        prior={
            "A": "mean: " + ("the adapter's own" if args.adapter else "its initialisation") + ", precision 3 d_in",
            "B": "mean: zero",
            "choice": args.prior_precision,
            "grouping": args.grouping,
            "precision": summary(precision, args.grouping),
        },
        fit={
            "method": f"laplace-{args.structure}",
            "last_layer": args.last_layer,
            "variational": args.task == "choice" and not args.adapter and not args.no_variational,
            **(
                {"sharing": args.sharing, "curvature_rank": args.curvature_rank} if args.structure != "diagonal" else {}
            ),
            "coupling": coupling,
            "training": None if args.adapter else asdict(training),
            **({"evidence_by_epochs": evidences} if evidences else {}),
            "log_likelihood": log_lik,
            "evidence": log_evidence(model, origin, gaussian, log_lik),
            "effective_dimension": sum(
                blockwise.effective_dimension(block, precision[name]) for name, block in curvature.items()
            )
            / coupling,
        },
        curvature=curvature,
        precision=precision,
        full=gaussian.full,
        width=drawn,
    )


@dataclass(frozen=True)
class Trained:
    """An adapter, the prior's mean, the Gaussian around it, and log p(D) in nats of it."""

    epochs: int
    theta: lora.Theta
    origin: lora.Theta
    gaussian: Gaussian
    evidence: float


def train_by_evidence(job: Job) -> tuple[Trained, dict[int, float]]:
    """`train` for as many epochs as the evidence asks for, and log p(D) in nats by epochs.

    From EPOCHS they are halved as long as that is worth it, or else doubled, to MOST_EPOCHS; each training begins anew.
    The likelihood of the rows goes on rising as they are learned by heart, but it pays with a theta* that is far from
    the prior's mean and known too exactly: the evidence (MacKay 1992) weighs both.
    """
    model, start, found = job.model, lora.get(job.model), dict[int, float]()

    def trained(epochs: int) -> Trained:
        lora.put(model, start)
        training = replace(job.training, epochs=epochs)
        origin, gaussian = train(model, job.examples, job.args, training, job.checkpoint / f"epochs-{epochs}")
        found[epochs] = log_evidence(model, origin, gaussian, job.log_likelihood())
        print(f"log evidence after {epochs} epochs: {found[epochs]:.1f}")
        return Trained(epochs, lora.get(model), origin, gaussian, found[epochs])

    best = trained(EPOCHS)
    for factor in (0.5, 2):
        while 1 <= (epochs := int(best.epochs * factor)) <= MOST_EPOCHS and epochs not in found:
            other = trained(epochs)
            if other.evidence < best.evidence + WORTH:
                break
            best = other
    lora.put(model, best.theta)
    return best, found


def train(
    model: Any, examples: Sequence[Example], args: argparse.Namespace, training: Training, checkpoint: Checkpoint
) -> tuple[lora.Theta, Gaussian]:
    """Train the adapter in place; returns the prior's mean and the Gaussian around the trained theta*.

    First the burn-in: MAP under a weak prior. Then epochs of training take turns with updates of the curvature, of the
    prior precision by the evidence (MacKay; Immer et al. 2021) and, for choices, of the posterior covariance S_n of the
    scores. The next epoch's likelihood is its expectation over f_n ~ N(f_n(theta), S_n), which makes theta* the mean of
    a variational Gaussian (Opper & Archambeau 2009) instead of a mode: a mode ignores what the spread costs, lies too
    close to the prior, and leaves a plain Laplace predictive under-confident (Nickisch & Rasmussen 2008). The turns end
    with the epochs, not at convergence: theta* belongs to the covariance of the epoch before the last. With
    --last-layer the other layers are at their MAP under B's precision PRECISION, and the evidence is that given them.
    benchmarks/laplace.py shows what the variational mean buys, and what it does not.
    """
    fixed = number(args.prior_precision)
    start = prior_precision(lora.get(model), PRECISION if fixed is None else fixed)
    if fixed is None:
        weak = FIRST_PRECISION * examples[0].scale ** 2  # as weak for the scaled scores
        start |= {name: weak for name in uncertain(start, args.last_layer) if name.endswith(".B")}
    trainer = Trainer(model, examples, start, training)
    gaussian: Gaussian | None = None

    def after_epoch() -> None:
        nonlocal gaussian
        if trainer.step >= BURN_IN * trainer.total:
            gaussian = around(model, trainer.origin, trainer.examples, args, leave=trainer.done)
            trainer.precision |= gaussian.precision
            if args.task == "choice" and not args.no_variational and not trainer.done:
                trainer.examples = spread(model, trainer.examples, gaussian, args.batch_size)

    checkpoint.complete(trainer, after_epoch)
    return trainer.origin, gaussian or around(model, trainer.origin, trainer.examples, args)


def around(
    model: Any, origin: lora.Theta, examples: Sequence[Example], args: argparse.Namespace, leave: bool = True
) -> Gaussian:
    """The Gaussian around the adapter as it is: curvature, and the prior precision that was asked for."""
    origin = {name: origin[name] for name in uncertain(origin, args.last_layer)}
    blocks, sketch = measure(model, examples, args, fixed_precision(origin), leave)
    fixed = number(args.prior_precision)
    if fixed is None:
        moved = distances(model, origin)
        precision, coupling = blockwise.settle(blocks, sketch, moved, args.grouping, fixed_precision(origin))
    else:
        precision = prior_precision(origin, fixed)
        coupling = blockwise.coupling(blocks, precision, sketch.eigenvalues(fixed))
    common = next(value for name, value in precision.items() if name.endswith(".B"))
    full = sketch.full(common) if args.structure == "full" else None
    return Gaussian(blockwise.coupled(blocks, coupling), precision, coupling, full)


def spread(model: Any, examples: Sequence[Example], gaussian: Gaussian, batch_size: int) -> list[Example]:
    """The examples with the posterior covariance of their scores, S_n = J_n P^-1 J_n^T."""
    matrices = lora.matrices(model)
    device = next(iter(matrices.values())).weight.device
    law = gaussian.law.to(device)
    result = list(examples)
    for indices, batch in batches(examples, batch_size):
        _, (covariance,) = moments(model, matrices, law, batch.to(device))
        for row, index in enumerate(indices):
            result[index] = replace(examples[index], spread=covariance[row].float().cpu())
    return result


def measure(
    model: Any, examples: Sequence[Example], args: argparse.Namespace, fixed: Mapping[str, float], leave: bool = True
) -> tuple[dict[str, kfac.Block], Sketch]:
    """The curvature of the uncertain matrices over all examples and a sketch of their whole Fisher, with a progress
    bar."""
    model.eval().requires_grad_(False)
    found = lora.matrices(model)
    matrices = {name: found[name] for name in uncertain(found, args.last_layer)}
    sketch = Sketch(matrices, fixed, seed=args.seed)
    with tqdm(total=len(examples), desc="curvature", unit="row", leave=leave) as bar:
        blocks = kfac.fit(
            model,
            matrices,
            (batch.to(args.device) for _, batch in batches(examples, args.batch_size)),
            structure=args.structure,
            sharing=args.sharing,
            rank=args.curvature_rank,
            samples=args.label_samples,
            seed=args.seed,
            sketch=sketch,
            progress=bar.update,
        )
    return blocks, sketch


def heldout_factor(model: Any, law: blockwise.Law, heldout: Sequence[Example], batch_size: int) -> float:
    """The multiple of the prior precision whose linearised predictive has the lowest NLL on held-out rows."""
    loss = torch.zeros(len(HELDOUT_FACTORS), dtype=torch.float64)
    device = next(iter(lora.matrices(model).values())).weight.device
    law = law.to(device)
    for _, batch in batches(heldout, batch_size):
        mean, covariance = moments(model, lora.matrices(model), law, batch.to(device), HELDOUT_FACTORS)
        for choice in range(len(loss)):
            for row, label in enumerate(batch.label.tolist()):
                loss[choice] -= from_gaussian(mean[row].cpu(), covariance[choice, row].cpu()).probability[label].log()
    return HELDOUT_FACTORS[int(loss.argmin())]


def rescaled(gaussian: Gaussian, factor: float) -> Gaussian:
    """With `factor` times the prior precision."""
    precision = {name: value * factor for name, value in gaussian.precision.items()}
    full = gaussian.full.rescaled(factor) if gaussian.full else None
    return replace(gaussian, precision=precision, full=full)


def log_evidence(model: Any, origin: lora.Theta, gaussian: Gaussian, log_likelihood: float) -> float:
    """log p(D) in nats of the adapter as it is, with the Gaussian around it."""
    moved = distances(model, origin)
    return blockwise.evidence(gaussian.curvature, moved, gaussian.precision, log_likelihood, gaussian.coupling)


def distances(model: Any, origin: lora.Theta) -> dict[str, float]:
    """|theta - theta_0|^2 of each matrix."""
    theta = lora.get(model)
    return {name: blockwise.square_distance(theta, origin, [name]) for name in origin}


def uncertain(names: Iterable[str], last_layer: bool) -> list[str]:
    """The matrices that get a Gaussian: all, or those of the last layer that has any. Raises PosteriorError."""
    layers = {name: int(found[1]) if (found := re.search(r"\.(\d+)\.", name)) else -1 for name in names}
    last = max(layers.values())
    if last_layer and last < 0:
        raise PosteriorError(
            f"--last-layer finds no layer's number in names such as {next(iter(layers))!r}; leave it out"
        )
    return [name for name, layer in layers.items() if layer == last or not last_layer]


def summary(precision: Mapping[str, float], grouping: blockwise.Grouping) -> dict[str, float]:
    """One prior precision per group of B matrices, for people to read."""
    names = [name for name in precision if name.endswith(".B")]
    return {group: precision[members[0]] for group, members in blockwise.groups(names, grouping).items()}


def foreign_origin(theta: lora.Theta) -> lora.Theta:
    """The prior mean we can give somebody's adapter: B = 0, and A where it is (its initialisation is not known)."""
    return {name: value if name.endswith(".A") else torch.zeros_like(value) for name, value in theta.items()}
