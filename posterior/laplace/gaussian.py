"""`--method laplace`: MAP or the mean of a variational Gaussian, its curvature, and the prior by the evidence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from posterior.curvature import kfac
from posterior.curvature.sketch import Full, Sketch
from posterior.data.examples import Examples, batches
from posterior.laplace import blockwise, width
from posterior.laplace.linearized import moments
from posterior.models import lora
from posterior.predictive.mixture import from_gaussian
from posterior.settings import POSITIVE, Range, SettingError, setting
from posterior.training.map import Checkpoint, Trainer, Training
from posterior.training.method import ADAPTER, EPOCHS, LORA, PRECISION, SCALE, Job, Result, Trained
from posterior.training.prior import Grouping, fixed_precision, groups, prior_precision

# The evidence must not speak before theta* has seen the data: near B = 0 it finds B hardly moved, and chooses a prior
# so tight that B stays there. Until then B's prior is weak.
BURN_IN = 0.5  # share of the training steps
FIRST_PRECISION = 1.0  # of B, during the burn-in; on yelp and SST-2 the evidence then chooses 4 to 14
WORTH = 1.0  # nats of evidence that other epochs must bring; less is none to speak of (Kass & Raftery 1995)
MOST_EPOCHS = 32  # that the evidence may ask for
EVIDENCE: Literal["evidence"] = "evidence"
HELDOUT: Literal["heldout"] = "heldout"
LAPLACE = "Laplace (method laplace)"  # a heading of the command's help
TRAINING = ("rank", "alpha", "rslora", "targets", "dropout", "learning_rate", "epochs", "steps", "variational")
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
    def covariance(self) -> blockwise.Covariance:
        return self.full or blockwise.Blocks(self.curvature, self.precision)

    @property
    def effective_dimension(self) -> float:
        """How many parameters the data determine."""
        each = (blockwise.effective_dimension(b, self.precision[name]) for name, b in self.curvature.items())
        return sum(each) / self.coupling


@dataclass(frozen=True, kw_only=True)
class Laplace(Trained):
    """A Gaussian around one adapter: a new one, or the one that is given."""

    epochs: int | Literal["evidence"] | None = setting(
        None,
        f"passes over the data: a number (default {EPOCHS}), or evidence (default of laplace where answers have "
        f"several tokens): {EPOCHS}, or half or twice as many, each time anew, as long as the evidence rises",
        Range(1, 10_000),
        LORA,
    )
    prior_precision: float | Literal["evidence", "heldout"] = setting(
        EVIDENCE,
        "of B: evidence (default of laplace) or heldout, both for laplace only, or a number to hold fixed (default of "
        f"the other methods: {PRECISION:g})",
        POSITIVE,
        LORA,
    )
    scale: float | Literal["evidence"] | None = setting(
        None,
        f"{SCALE}: evidence (default of laplace where answers have several tokens), or a number (default 1)",
        POSITIVE,
        LORA,
    )
    adapter: Path | None = setting(None, ADAPTER)
    structure: kfac.Structure = setting(
        "kfac",
        "of the curvature: each matrix's Kronecker factors (kfac); for the linearised predictive that of all matrices "
        "together (full); or each matrix's diagonal alone",
        group=LAPLACE,
    )
    last_layer: bool = setting(
        False, "only the last layer's matrices are uncertain, the others stay at theta*", group=LAPLACE
    )
    grouping: Literal["scalar", "layer"] = setting(
        "scalar",
        "one prior precision for all B (scalar) or, by blocks, one for each; A keeps that of its initialisation",
        group=LAPLACE,
    )
    variational: bool = setting(
        True, "plain MAP and Laplace: theta* is a mode instead of the mean of a variational Gaussian", group=LAPLACE
    )
    sharing: kfac.Sharing = setting("expand", "how KFAC treats positions", group=LAPLACE)
    curvature_rank: int | Literal["whole"] = setting(
        32,
        "keep the large factors in this rank plus an isotropic remainder, or 'whole'",
        Range(1, 2**20),
        LAPLACE,
    )
    label_samples: int = setting(1, "sampled labels a row for a text task's Fisher", Range(1, 2**16), LAPLACE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs == EVIDENCE and self.steps is not None:
            raise SettingError("{epochs} evidence and {steps} both say how long to train; leave one out")
        if self.scale == EVIDENCE and self.adapter is not None:
            raise SettingError("{scale} evidence is for an adapter that laplace trains; give a number")
        if self.grouping == "layer" and self.structure == "full":
            raise SettingError("{grouping} layer goes by blocks; give {structure} kfac or diagonal with it")

    def ignored(self) -> Mapping[str, str]:
        trained = "is for training an adapter, but {adapter} is a trained one; leave one out"
        factors = "belongs to {structure} full or kfac; diagonal does not use it"
        return {
            **(dict.fromkeys(TRAINING, trained) if self.adapter is not None else {}),
            **(dict.fromkeys(("sharing", "curvature_rank"), factors) if self.structure == "diagonal" else {}),
        }

    def for_answers(self, several_tokens: bool) -> Laplace:
        """With the epochs and the scale that were left open: where an adapter is trained for answers of several tokens
        the evidence chooses both."""
        trained = several_tokens and self.adapter is None
        open_epochs = EVIDENCE if trained and self.steps is None else None
        return replace(self, epochs=self.epochs or open_epochs, scale=self.scale or (EVIDENCE if trained else 1.0))

    @property
    def rank_kept(self) -> int | None:
        """None for the whole factors."""
        return None if self.curvature_rank == "whole" else self.curvature_rank

    @property
    def fixed_precision(self) -> float | None:
        """None where the data choose it."""
        return None if isinstance(self.prior_precision, str) else self.prior_precision

    @property
    def training(self) -> Training:
        """Where the evidence chooses the epochs, it starts at these."""
        return self.schedule(self.epochs if isinstance(self.epochs, int) else EPOCHS)

    def fit(self, job: Job) -> Result:
        """A Laplace posterior of a new adapter, or of the one that was given."""
        model, examples = job.model, job.examples
        training, evidences = self.training, dict[int, float]()
        if self.adapter is not None:
            origin = foreign_origin(lora.get(model))
            gaussian = around(model, origin, examples, self)
        elif self.epochs == EVIDENCE:
            best, evidences = train_by_evidence(self, job)
            origin, gaussian, training = best.origin, best.gaussian, replace(training, epochs=best.epochs)
        else:
            origin, gaussian = train(model, examples, self, training, job.checkpoint)
        if self.prior_precision == HELDOUT:
            gaussian = rescaled(gaussian, heldout_factor(model, gaussian.covariance, job.heldout, self.batch_size))
        drawn = 1.0  # a text's predictive has no linearised twin
        if examples[0].is_choice:
            parts = gaussian.covariance, gaussian.curvature, gaussian.precision
            drawn = width.fit(model, *parts, examples, self.batch_size)
        log_likelihood = job.log_likelihood(self.batch_size)
        return Result(
            family="laplace",
            mean=lora.get(model),
            prior=self._prior(gaussian.precision),
            fit={
                **self._record(examples[0].is_choice),
                "coupling": gaussian.coupling,
                "training": None if self.adapter is not None else asdict(training),
                **({"evidence_by_epochs": evidences} if evidences else {}),
                "log_likelihood": log_likelihood,
                "evidence": log_evidence(model, origin, gaussian, log_likelihood),
                "effective_dimension": gaussian.effective_dimension,
            },
            curvature=gaussian.curvature,
            precision=gaussian.precision,
            full=gaussian.full,
            width=drawn,
        )

    def _prior(self, precision: Mapping[str, float]) -> dict[str, Any]:
        """For the record."""
        mean = "its initialisation" if self.adapter is None else "the adapter's own"
        return {
            "A": f"mean: {mean}, precision 3 d_in",
            "B": "mean: zero",
            "choice": self.prior_precision if self.fixed_precision is None else f"{self.fixed_precision:g}",
            "grouping": self.grouping,
            "precision": summary(precision, self.grouping),
        }

    def _record(self, choice: bool) -> dict[str, Any]:
        factors = {"sharing": self.sharing, "curvature_rank": self.rank_kept}
        return {
            "method": f"laplace-{self.structure}",
            "last_layer": self.last_layer,
            "variational": choice and self.adapter is None and self.variational,
            **(factors if self.structure != "diagonal" else {}),
        }


@dataclass(frozen=True)
class Candidate:
    """An adapter, the prior's mean, the Gaussian around it, and log p(D) in nats of it."""

    epochs: int
    theta: lora.Theta
    origin: lora.Theta
    gaussian: Gaussian
    evidence: float


def train_by_evidence(method: Laplace, job: Job) -> tuple[Candidate, dict[int, float]]:
    """`train` for as many epochs as the evidence asks for, and log p(D) in nats by epochs.

    From EPOCHS they are halved as long as that is worth it, or else doubled, to MOST_EPOCHS; each training begins anew.
    The likelihood of the rows goes on rising as they are learned by heart, but it pays with a theta* that is far from
    the prior's mean and known too exactly: the evidence (MacKay 1992) weighs both.
    """
    model, start, found = job.model, lora.get(job.model), dict[int, float]()

    def trained(epochs: int) -> Candidate:
        lora.put(model, start)
        training = replace(method.training, epochs=epochs)
        origin, gaussian = train(model, job.examples, method, training, job.checkpoint / f"epochs-{epochs}")
        found[epochs] = log_evidence(model, origin, gaussian, job.log_likelihood(method.batch_size))
        print(f"log evidence after {epochs} epochs: {found[epochs]:.1f}")
        return Candidate(epochs, lora.get(model), origin, gaussian, found[epochs])

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
    model: Any, examples: Examples, method: Laplace, training: Training, checkpoint: Checkpoint
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
    fixed = method.fixed_precision
    start = prior_precision(lora.get(model), PRECISION if fixed is None else fixed)
    if fixed is None:
        weak = FIRST_PRECISION * examples.scoring.scale**2  # as weak for the scaled scores
        start |= {name: weak for name in uncertain(start, method.last_layer) if name.endswith(".B")}
    trainer = Trainer(model, examples, start, training)
    gaussian: Gaussian | None = None

    def after_epoch() -> None:
        nonlocal gaussian
        if trainer.step >= BURN_IN * trainer.total:
            gaussian = around(model, trainer.origin, trainer.examples, method, leave=trainer.done)
            trainer.precision |= gaussian.precision
            if examples[0].is_choice and method.variational and not trainer.done:
                trainer.examples = spread(model, trainer.examples, gaussian, method.batch_size)

    checkpoint.complete(trainer, after_epoch)
    return trainer.origin, gaussian or around(model, trainer.origin, trainer.examples, method)


def around(model: Any, origin: lora.Theta, examples: Examples, method: Laplace, leave: bool = True) -> Gaussian:
    """The Gaussian around the adapter as it is: curvature, and the prior precision that was asked for."""
    origin = {name: origin[name] for name in uncertain(origin, method.last_layer)}
    blocks, sketch = measure(model, examples, method, fixed_precision(origin), leave)
    fixed = method.fixed_precision
    if fixed is None:
        moved = distances(model, origin)
        precision, coupling = blockwise.settle(blocks, sketch, moved, method.grouping, fixed_precision(origin))
    else:
        precision = prior_precision(origin, fixed)
        coupling = blockwise.coupling(blocks, precision, sketch.eigenvalues(fixed))
    common = next(value for name, value in precision.items() if name.endswith(".B"))
    full = sketch.full(common) if method.structure == "full" else None
    return Gaussian(blockwise.coupled(blocks, coupling), precision, coupling, full)


def spread(model: Any, examples: Examples, gaussian: Gaussian, batch_size: int) -> Examples:
    """The examples with the posterior covariance of their scores, S_n = J_n P^-1 J_n^T."""
    matrices = lora.matrices(model)
    device = next(iter(matrices.values())).weight.device
    covariance = gaussian.covariance.to(device)
    result = list(examples)
    for indices, batch in batches(examples, batch_size):
        _, (found,) = moments(model, matrices, covariance, batch.to(device))
        for row, index in enumerate(indices):
            result[index] = replace(examples[index], spread=found[row].float().cpu())
    return replace(examples, rows=result)


def measure(
    model: Any, examples: Examples, method: Laplace, fixed: Mapping[str, float], leave: bool = True
) -> tuple[dict[str, kfac.Block], Sketch]:
    """The curvature of the uncertain matrices over all examples and a sketch of their whole Fisher, with a progress
    bar."""
    model.eval().requires_grad_(False)
    found = lora.matrices(model)
    matrices = {name: found[name] for name in uncertain(found, method.last_layer)}
    device = next(iter(matrices.values())).weight.device
    sketch = Sketch(matrices, fixed, seed=method.seed)
    with tqdm(total=len(examples), desc="curvature", unit="row", leave=leave) as bar:
        blocks = kfac.fit(
            model,
            matrices,
            (batch.to(device) for _, batch in batches(examples, method.batch_size)),
            structure=method.structure,
            sharing=method.sharing,
            rank=method.rank_kept,
            samples=method.label_samples,
            seed=method.seed,
            sketch=sketch,
            progress=bar.update,
        )
    return blocks, sketch


def heldout_factor(model: Any, covariance: blockwise.Covariance, heldout: Examples, batch_size: int) -> float:
    """The multiple of the prior precision whose linearised predictive has the lowest NLL on held-out rows."""
    loss = torch.zeros(len(HELDOUT_FACTORS), dtype=torch.float64)
    device = next(iter(lora.matrices(model).values())).weight.device
    covariance = covariance.to(device)
    for _, batch in batches(heldout, batch_size):
        mean, spread = moments(model, lora.matrices(model), covariance, batch.to(device), HELDOUT_FACTORS)
        for choice in range(len(loss)):
            for row, label in enumerate(batch.label.tolist()):
                loss[choice] -= from_gaussian(mean[row].cpu(), spread[choice, row].cpu()).probability[label].log()
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
        raise SettingError(
            "{last_layer} finds no layer's number in names such as {name!r}; leave it out", name=next(iter(layers))
        )
    return [name for name, layer in layers.items() if layer == last or not last_layer]


def summary(precision: Mapping[str, float], grouping: Grouping) -> dict[str, float]:
    """One prior precision per group of B matrices, for people to read."""
    names = [name for name in precision if name.endswith(".B")]
    return {group: precision[members[0]] for group, members in groups(names, grouping).items()}


def foreign_origin(theta: lora.Theta) -> lora.Theta:
    """The prior mean we can give somebody's adapter: B = 0, and A where it is (its initialisation is not known)."""
    return {name: value if name.endswith(".A") else torch.zeros_like(value) for name, value in theta.items()}
