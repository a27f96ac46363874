"""Label smoothing (Szegedy et al. 2016, arXiv 1512.00567): the grid's MAP, trained on labels that are 90 % sure."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from posterior.cli import fit as fit_command
from posterior.cli import imported
from posterior.data.examples import Batch, encode
from posterior.data.reading import read_rows
from posterior.data.task import Task
from posterior.laplace.gaussian import Laplace
from posterior.likelihood.scores import scores
from posterior.models import devices, lora
from posterior.models.base import load_model, load_tokenizer, resolve
from posterior.storage import artefact
from posterior.training.map import Trainer
from posterior.training.prior import prior_precision

SMOOTHING = 0.1  # of the probability is shared equally by all candidates


class Smoothed(Trainer):
    """Trainer whose loss is the cross-entropy with the smoothed labels."""

    def loss(self, batch: Batch) -> Tensor:
        return cross_entropy(scores(self.model, batch), batch.label, label_smoothing=SMOOTHING)


def fit(args: argparse.Namespace) -> artefact.Posterior:
    """What `posterior fit --method ensemble --particles 1` makes of the same arguments, but for the loss."""
    base, task = resolve(), Task("choice", args.template, args.answers and tuple(args.answers), chat=False)
    method: Laplace = fit_command.method(args)
    model = lora.attach(load_model(base, getattr(torch, args.dtype), devices.check(args.device)), base_id=base.id)
    lora.initialise(model, method.member_seed(0))
    tokenizer: Any = load_tokenizer(base)
    examples = encode(task, tokenizer, read_rows(args.data))
    precision = prior_precision(lora.get(model), method.prior_precision)
    trainer = Smoothed(model, examples, precision, replace(method.training, seed=method.member_seed(0)))
    while not trainer.done:
        trainer.run_epoch()
    parser = argparse.ArgumentParser()
    imported.add_arguments(parser)
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter"
        lora.write_adapter(adapter, lora.get(model), lora.config_of(model))
        words = [str(adapter), "--out", str(args.out), "--template", args.template]
        return imported.call(parser.parse_args([*words, *(["--answers", *args.answers] if args.answers else [])]))
