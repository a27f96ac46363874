"""MAP training: the objective, resuming, and failing early."""

from __future__ import annotations

import pytest
import torch

from posterior.data.examples import collate
from posterior.errors import PosteriorError
from posterior.likelihood.scores import log_likelihood
from posterior.models import lora
from posterior.training.map import Checkpoint, Trainer, Training
from tests.posterior.conftest import make_examples, tiny_llama

EXAMPLES = make_examples(10)


def trainer(**options) -> Trainer:
    model = lora.attach(tiny_llama(), rank=2, alpha=4, dropout=options.pop("dropout", 0.0), seed=0)
    precision = dict.fromkeys(lora.matrices(model), options.pop("precision", 2.0))
    return Trainer(model, EXAMPLES, precision, Training(**{"batch_size": 4, "epochs": 4, **options}))


def test_the_prior_is_in_the_loss_not_decoupled():
    """Full-batch training ends where the gradient of -sum log p + (lambda/2)|theta - theta_0|^2 vanishes (decay
    elsewhere would not)."""
    run = trainer(batch_size=10, epochs=600, learning_rate=0.02, precision=5.0)
    while not run.done:
        run.run_epoch()
    for module in run.matrices.values():
        module.weight.requires_grad_(True)
    likelihood = -log_likelihood(run.model, collate(EXAMPLES)).sum()
    weights = [module.weight for module in run.matrices.values()]
    grads = torch.autograd.grad(likelihood, weights)
    for (name, module), grad in zip(run.matrices.items(), grads, strict=True):
        total = grad + run.precision[name] * (module.weight - run.origin[name])
        assert float(total.detach().norm()) < 0.05 * max(1.0, float(grad.norm())), name
    assert max(float(grad.norm()) for grad in grads) > 0.5  # the likelihood alone is not stationary: the prior holds it


def test_a_wide_prior_moves_further():
    moved = []
    for precision in (0.1, 1000.0):
        run = trainer(precision=precision)
        while not run.done:
            run.run_epoch()
        moved.append(
            sum(float((value - run.origin[name]).square().sum()) for name, value in lora.get(run.model).items())
        )
    assert moved[0] > 2 * moved[1]


def test_resuming_is_exact(tmp_path):
    """Two epochs, a checkpoint, two more in a new trainer: bit for bit the four epochs in one go, with dropout."""
    whole, first, second = (trainer(dropout=0.2) for _ in range(3))
    for _ in range(4):
        whole.run_epoch()
    for _ in range(2):
        first.run_epoch()
    first.save(tmp_path / "state")
    second.resume(tmp_path / "state")
    while not second.done:
        second.run_epoch()
    expected, resumed = lora.get(whole.model), lora.get(second.model)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_a_checkpoint_is_of_one_fit(tmp_path):
    """A state without its mark, or of another fit, begins anew: both are one file, so no crash can part them."""
    run, mine, other = trainer(), Checkpoint(tmp_path / "c", "mine"), Checkpoint(tmp_path / "c", "other")
    run.run_epoch()
    mine.save(run)
    for checkpoint, step in ((mine, run.step), (other, 0)):
        again = trainer()
        checkpoint.resume(again)
        assert again.step == step
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize("content", [b"", b"x" * 100])
def test_a_damaged_checkpoint_is_one_line(tmp_path, content):
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(PosteriorError, match="state.safetensors is damaged .*; delete it and begin anew"):
        Checkpoint(tmp_path, "mine").resume(trainer())


def test_two_fits_do_not_share_a_checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path / ".it.checkpoint", "mine")
    with checkpoint.held():
        (tmp_path / ".it.checkpoint").mkdir()
        with pytest.raises(PosteriorError, match="another process is at work on"):
            checkpoint.held().__enter__()
    assert list(tmp_path.iterdir()) == []


def test_steps_stop_in_the_middle_of_an_epoch():
    run = trainer(steps=4)
    while not run.done:
        run.run_epoch()
    assert (run.step, run.epoch) == (4, 2)


def test_a_loss_that_is_not_a_number_stops_with_the_step():
    run = trainer()
    with torch.no_grad():
        next(iter(run.matrices.values())).weight.fill_(float("nan"))
    with pytest.raises(PosteriorError, match="step 0; lower the learning rate"):
        run.run_epoch()
