"""What `posterior fit` prepares for a method, and what every method hands back: the seam between fit.py and one file a
method."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from posterior.curvature.kfac import Block
from posterior.curvature.sketch import Full
from posterior.data.examples import Example, batches
from posterior.laplace import blockwise
from posterior.likelihood.scores import log_likelihood
from posterior.models import lora
from posterior.storage.artefact import Family
from posterior.training.map import Checkpoint, Training

PRECISION = 10.0  # of B where no evidence chooses it: the Laplace's evidence finds 4 to 14 on yelp and SST-2
EVIDENCE = "evidence"  # the value of options that the evidence chooses
EPOCHS = 8  # where nothing says how many
MEMBERS = 1000  # seeds set apart for the members of one fit: two fits with neighbouring seeds share none


@dataclass(frozen=True)
class Job:
    """model: the base with a fresh adapter, or with the one of --adapter; args: the command's, checked."""

    model: PeftModel
    examples: Sequence[Example]
    heldout: Sequence[Example]
    args: argparse.Namespace
    checkpoint: Checkpoint

    @property
    def training(self) -> Training:
        """As the options say; where the evidence chooses the epochs, it starts at these."""
        a = self.args
        return Training(a.learning_rate, EPOCHS if a.epochs == EVIDENCE else a.epochs, a.steps, a.batch_size, a.seed)

    @property
    def device(self) -> torch.device:
        return next(iter(lora.matrices(self.model).values())).weight.device

    def member_seed(self, index: int) -> int:
        return int(self.args.seed) * MEMBERS + index

    def log_likelihood(self) -> float:
        """log p(D|theta) in nats of the adapter as it is."""
        self.model.eval()  # a resumed training may have had no epoch left that would have ended so
        with torch.no_grad():
            return sum(
                float(log_likelihood(self.model, batch.to(self.device)).double().sum())
                for _, batch in batches(self.examples, self.args.batch_size)
            )


@dataclass(frozen=True)
class Result:
    """The arguments of `artefact.save` that depend on the method. mean: what map/ holds; prior, fit: for the record."""

    family: Family
    mean: lora.Theta
    prior: dict[str, Any]
    fit: dict[str, Any]
    curvature: Mapping[str, Block] = field(default_factory=dict)
    precision: Mapping[str, float] = field(default_factory=dict)
    full: Full | None = None
    width: float = 1.0
    particles: Sequence[lora.Theta] = ()
    weights: Sequence[float] = ()


def particles(thetas: Sequence[lora.Theta], mean: lora.Theta, job: Job, fit: Mapping[str, Any]) -> Result:
    """Equally weighted particles; map/ holds `mean`."""
    return Result(
        family="particles",
        mean=mean,
        prior={
            "A": "mean: its initialisation, precision 3 d_in",
            "B": "mean: its initialisation" if job.args.init == "pissa" else "mean: zero",
            "choice": job.args.prior_precision,
            "precision": {"all": number(job.args.prior_precision)},
        },
        fit=dict(fit),
        particles=thetas,
        weights=[1 / len(thetas)] * len(thetas),
    )


def prior_precision(theta: Mapping[str, Tensor], b: float) -> dict[str, float]:
    """Prior precisions by matrix: A's own (its initialisation's), and `b` for every B."""
    return dict.fromkeys(theta, b) | fixed_precision(theta)


def fixed_precision(theta: Mapping[str, Tensor]) -> dict[str, float]:
    """Those that no method chooses: every A's."""
    initial = {name: blockwise.initial_precision(name, value) for name, value in theta.items()}
    return {name: value for name, value in initial.items() if value is not None}


def number(text: str) -> float | None:
    """An option's value as a number; None when it is a word."""
    try:
        return float(text)
    except ValueError:
        return None
