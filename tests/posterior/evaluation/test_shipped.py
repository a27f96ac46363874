"""The posterior that ships: it fits the default base, and it knows something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posterior.calibration.metrics import accuracy, nll
from posterior.data.examples import encode
from posterior.data.reading import read_rows
from posterior.evaluation.predictions import linearized, sampled
from posterior.models import lora
from posterior.models.base import load_model, load_tokenizer, resolve
from posterior.storage import artefact
from server.configuration.schema import SHIPPED

TEST = Path(__file__).parents[3] / "benchmarks" / "data" / "yelp.test.jsonl"


@pytest.mark.long
def test_the_shipped_posterior_answers_well():
    """32 sentences it has not seen; chance is 0.5 and log 2. `make bench` measures it on all of them."""
    posterior = artefact.load(SHIPPED / "sentiment")
    base = resolve()
    posterior.check_base(base.hash)
    examples = encode(posterior.task, load_tokenizer(base), read_rows(TEST)[:32])
    labels = torch.tensor([example.label for example in examples])
    model = lora.load_peft(load_model(base, torch.float32, "cpu"), posterior.map_dir).eval().requires_grad_(False)
    exact = linearized(model, posterior.covariance, examples).probability
    assert accuracy(exact, labels) >= 0.85 and nll(exact, labels) < 0.4
    mixture = sampled(model, posterior, 4, examples).probability
    assert accuracy(mixture, labels) >= 0.8 and nll(mixture, labels) < 0.5
