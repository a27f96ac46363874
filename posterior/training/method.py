"""What methods of fitting have in common: their settings, what `posterior.fit` prepares for them (Job), and what every
one hands back (Result). One method, one file: a settings class whose `fit` takes a Job."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from posterior.curvature.kfac import Block
from posterior.curvature.sketch import Full
from posterior.data.examples import Examples, batches
from posterior.likelihood.scores import log_likelihood
from posterior.models import lora
from posterior.settings import POSITIVE, Range, Settings, setting
from posterior.training.map import Checkpoint, Training

if TYPE_CHECKING:
    from peft import PeftModel

PRECISION = 10.0  # of B where no evidence chooses it: the Laplace's evidence finds 4 to 14 on yelp and SST-2
EPOCHS = 8  # where nothing says how many
MEMBERS = 1000  # seeds set apart for the members of one fit: two fits with neighbouring seeds share none

Family = Literal["laplace", "particles"]
Prior = dict[str, Any]
SCALE = "what a choice's scores are multiplied by before the softmax"
TEMPERATURE = "svgd, ivon: of the posterior, p^(1/T) (default 1 for svgd, 0.01 for ivon)"
ADAPTER = (
    "laplace or tfb of this trained PEFT adapter, LoRA or AdaLoRA, instead of training one (data: what it was trained "
    "on)"
)
LORA, PARTICLES = "LoRA and training", "particles (every method but laplace)"  # headings of the command's help


@dataclass(frozen=True, kw_only=True)
class Method(Settings, abc.ABC):
    """A way to fit a posterior."""

    batch_size: int = setting(8, "examples a step", Range(1, 2**16), LORA)
    seed: int = setting(0, "fixes initialisation, data order, dropout and sampled labels", Range(0, 2**32 - 1), LORA)

    @abc.abstractmethod
    def fit(self, job: Job) -> Result:
        """The posterior of the job's examples."""

    def member_seed(self, index: int) -> int:
        return self.seed * MEMBERS + index


@dataclass(frozen=True, kw_only=True)
class Trained(Method):
    """A method that trains adapters."""

    rank: int = setting(8, "rank r of A and B", Range(1, 512), LORA)  # of the adapters that vLLM serves
    alpha: int = setting(16, "update scale s = alpha / r", Range(1, 2**20), LORA)
    rslora: bool = setting(False, "scale by alpha / sqrt(r) instead", group=LORA)
    targets: tuple[str, ...] = setting(lora.DEFAULT_TARGETS, "module names to adapt", group=LORA)
    dropout: float = setting(0.0, "LoRA dropout while training", Range(0, 0.999), LORA)
    learning_rate: float = setting(1e-3, "peak of Adam's schedule", POSITIVE, LORA)
    steps: int | None = setting(None, "stop after this many optimiser steps instead", Range(1, 10**9), LORA)

    def schedule(self, epochs: int) -> Training:
        return Training(self.learning_rate, epochs, self.steps, self.batch_size, self.seed)


@dataclass(frozen=True, kw_only=True)
class Sampled(Method):
    """A method that ends in particles."""

    particles: int = setting(8, "how many adapters", Range(1, MEMBERS), PARTICLES)

    def result(self, thetas: Sequence[lora.Theta], mean: lora.Theta, fit: Mapping[str, Any], prior: Prior) -> Result:
        """Equally weighted particles; map/ holds `mean`."""
        weights = [1 / len(thetas)] * len(thetas)
        return Result(family="particles", mean=mean, prior=prior, fit=dict(fit), particles=thetas, weights=weights)


@dataclass(frozen=True, kw_only=True)
class TrainedParticles(Trained, Sampled):
    """A method that trains adapters and ends in particles, under a fixed prior."""

    epochs: int = setting(EPOCHS, "passes over the data", Range(1, 10_000), LORA)
    prior_precision: float = setting(PRECISION, "of B", POSITIVE, LORA)
    scale: float = setting(1.0, SCALE, POSITIVE, LORA)

    @property
    def training(self) -> Training:
        return self.schedule(self.epochs)

    @property
    def prior(self) -> Prior:
        """For the record."""
        pissa = getattr(self, "init", "random") == "pissa"
        return {
            "A": "mean: its initialisation, precision 3 d_in",
            "B": f"mean: {'its initialisation' if pissa else 'zero'}",
            "choice": f"{self.prior_precision:g}",
            "precision": {"all": self.prior_precision},
        }


@dataclass(frozen=True)
class Job:
    """What a method fits. model: the base with a fresh adapter, or with the one that is given; heldout: rows that only
    a prior is chosen by."""

    model: PeftModel
    examples: Examples
    heldout: Examples
    checkpoint: Checkpoint

    @property
    def device(self) -> torch.device:
        return next(iter(lora.matrices(self.model).values())).weight.device

    def log_likelihood(self, batch_size: int) -> float:
        """log p(D|theta) in nats of the adapter as it is."""
        self.model.eval()  # a resumed training may have had no epoch left that would have ended so
        with torch.no_grad():
            return sum(
                float(log_likelihood(self.model, batch.to(self.device)).double().sum())
                for _, batch in batches(self.examples, batch_size)
            )


@dataclass(frozen=True)
class Result:
    """What of a posterior depends on the method. mean: what map/ holds; prior, fit: for the record."""

    family: Family
    mean: lora.Theta
    prior: Prior
    fit: dict[str, Any]
    curvature: Mapping[str, Block] = field(default_factory=dict)
    precision: Mapping[str, float] = field(default_factory=dict)
    full: Full | None = None
    width: float = 1.0
    particles: Sequence[lora.Theta] = ()
    weights: Sequence[float] = ()
