"""How long a Laplace's adapter trains, when the evidence chooses it."""

from __future__ import annotations

import argparse

import pytest
import torch

from posterior.cli import fit
from posterior.errors import PosteriorError
from posterior.laplace import gaussian
from posterior.laplace.gaussian import Laplace
from posterior.models import lora

NOISE = torch.randint(0, 2, (48,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize(
    ("labels", "tried", "kept"),
    [
        pytest.param(NOISE, [8, 4, 2, 1], 2, id="nothing to learn"),
        pytest.param([0, 1] * 12, [8, 4, 16, 32], 32, id="all to learn", marks=pytest.mark.long),
    ],
)
def test_the_last_rise_is_kept(run_fit, tmp_path, labels, tried, kept):
    """Against fits of the numbers of epochs that are kept and tried last, which know nothing of other trainings."""
    rows = [{"text": f"row {index} is {('bad', 'good')[index % 2]}", "label": y} for index, y in enumerate(labels)]
    chosen = run_fit(tmp_path / "chosen", rows, epochs="evidence", learning_rate=0.02)
    found = {int(epochs): value for epochs, value in chosen.fit["evidence_by_epochs"].items()}
    assert list(found) == tried and chosen.fit["training"]["epochs"] == kept
    assert chosen.fit["evidence"] == found[kept] >= max(found.values()) - gaussian.WORTH
    for epochs in {kept, tried[-1]}:
        alone = run_fit(tmp_path / f"{epochs}", rows, epochs=epochs, learning_rate=0.02)
        assert alone.fit["evidence"] == found[epochs]
        if epochs == kept:
            first, second = lora.read_adapter(chosen.map_dir), lora.read_adapter(alone.map_dir)
            assert all(torch.equal(first[name], second[name]) for name in first)
            assert (chosen.precision, chosen.fit["coupling"]) == (alone.precision, alone.fit["coupling"])


@pytest.mark.long
def test_an_interrupted_choice_goes_on(run_fit, tmp_path, monkeypatch):
    """Killed in the second training, of 4 epochs, the next run ends where an uninterrupted one does."""
    options = {"epochs": "evidence", "learning_rate": 0.01}
    whole, original, calls = run_fit(tmp_path / "whole", **options), gaussian.measure, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # five of the first training, of 8 epochs
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(gaussian, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit(tmp_path / "cut", **options)
    monkeypatch.setattr(gaussian, "measure", original)
    cut = run_fit(tmp_path / "cut", **options)
    first, second = lora.read_adapter(whole.map_dir), lora.read_adapter(cut.map_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert cut.fit["evidence_by_epochs"] == whole.fit["evidence_by_epochs"]


def defaults(*words: str, tokens: int = 2) -> int | str:
    """--epochs of a fit to answers of so many tokens."""
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    method = fit.method(parser.parse_args(["rows.jsonl", "--out", "x", *words]))
    if not isinstance(method, Laplace):
        return method.training.epochs
    found = method.for_answers(several_tokens=tokens > 1)
    return found.epochs or found.training.epochs


def test_where_it_is_the_default():
    """Where laplace trains an adapter for answers of several tokens."""
    assert defaults() == defaults("--epochs", "evidence", tokens=1) == "evidence"
    assert defaults(tokens=1) == defaults("--steps", "3") == defaults("--method", "swag") == 8
    assert defaults("--adapter", "a") == 8
    assert defaults("--epochs", "3") == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": "evidence", "method": "swag"}, "belongs to --method laplace; swag needs a number"),
        ({"epochs": "evidence", "steps": 3}, "leave one out"),
    ],
)
def test_what_does_not_go_together(run_fit, options, match):
    with pytest.raises(PosteriorError, match=match):
        run_fit(**options)


def test_another_word_is_refused(capsys):
    with pytest.raises(SystemExit):
        defaults("--epochs", "many")
    assert "'many' is neither 'evidence' nor a whole number" in capsys.readouterr().err
