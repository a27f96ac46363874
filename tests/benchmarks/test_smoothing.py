"""The benchmark's label smoothing: the cross-entropy with the smoothed labels, under the same prior as MAP."""

from __future__ import annotations

import torch

from benchmarks.smoothing import SMOOTHING, Smoothed
from posterior.data.examples import collate
from posterior.likelihood.scores import scores
from posterior.models import lora
from posterior.training.map import Training
from tests.posterior.conftest import make_examples


def test_the_gradient_is_that_of_the_smoothed_labels(model):
    examples, batch = make_examples(6), collate(make_examples(6))
    trainer = Smoothed(model, examples, dict.fromkeys(lora.matrices(model), 2.0), Training())
    parameters = list(trainer.parameters.values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    logs = scores(model, batch).log_softmax(1)
    labels = torch.full_like(logs, SMOOTHING / 3)
    labels[torch.arange(6), batch.label] += 1 - SMOOTHING
    loss = -(labels * logs).sum() / 6
    expected = torch.autograd.grad(loss + trainer.penalty() / 6, parameters)
    assert abs(trainer.gradient(batch) - float(loss.detach())) < 1e-9  # all in float64
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-7, atol=1e-9)
