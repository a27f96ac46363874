"""`--method ensemble`: independent MAP runs in one artefact."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch

from posterior.cli import evaluate, inspect
from posterior.data.examples import collate, encode
from posterior.data.reading import read_rows
from posterior.errors import PosteriorError
from posterior.likelihood.scores import log_likelihood
from posterior.models import lora
from posterior.models.base import load_model, load_tokenizer, resolve
from posterior.storage import artefact
from posterior.training.map import Trainer, Training


def test_members_are_map_runs_of_their_own(run_fit, tiny_base, tmp_path):
    """Each member again by hand, from its own seed; and map/ is the one with the highest log p(theta, D)."""
    posterior = run_fit(method="ensemble", particles=3, seed=1, prior_precision="2000")
    assert posterior.family == "particles" and posterior.weights == (1 / 3,) * 3
    base = resolve(str(tiny_base))
    examples = encode(posterior.task, load_tokenizer(base), read_rows(tmp_path / "data.jsonl"))
    joint = []
    for index, folder in enumerate(posterior.adapters(3, tmp_path)):
        model = lora.attach(load_model(base, torch.float32, "cpu"), rank=2, alpha=16)
        lora.initialise(model, 1000 + index)
        origin = lora.get(model)
        precision = {name: 3.0 * value.shape[1] if name.endswith("A") else 2000.0 for name, value in origin.items()}
        trainer = Trainer(model, examples, precision, replace(Training(epochs=2), seed=1000 + index))
        while not trainer.done:
            trainer.run_epoch()
        found = lora.read_adapter(folder)
        for name, expected in lora.get(model).items():
            assert torch.equal(found[name], expected)
        with torch.no_grad():
            likelihood = float(log_likelihood(model, collate(examples)).double().sum())
        assert posterior.fit["log_likelihood"][index] == pytest.approx(likelihood, rel=1e-5)
        distance = {name: float((found[name] - origin[name]).double().square().sum()) for name in origin}
        joint.append(likelihood - sum(precision[name] * distance[name] for name in origin) / 2)
    assert posterior.fit["log_joint"] == pytest.approx(joint, rel=1e-5)
    likelihoods = posterior.fit["log_likelihood"]
    assert joint.index(max(joint)) != likelihoods.index(max(likelihoods))  # else this could not fail
    best = lora.read_adapter(posterior.path / "particles" / f"{joint.index(max(joint)):03d}")
    assert all(torch.equal(best[name], value) for name, value in lora.read_adapter(posterior.map_dir).items())


def test_initialisation_is_peft_s_own(model):
    lora.initialise(model, 1)
    first = lora.get(model)
    lora.initialise(model, 2)
    second = lora.get(model)
    lora.initialise(model, 1)
    for name, value in lora.get(model).items():
        assert torch.equal(value, first[name])
        if name.endswith("B"):
            assert not value.any()
        else:  # uniform within +-1/sqrt(d_in)
            assert not torch.equal(value, second[name])
            assert float(value.abs().max()) <= value.shape[1] ** -0.5 and float(value.abs().max()) > 0.1


def test_an_interrupted_ensemble_keeps_what_is_finished(run_fit, tmp_path, monkeypatch, capsys):
    whole = run_fit(tmp_path / "whole", method="ensemble", particles=3, dropout=0.2)
    original = Trainer.run_epoch
    epochs: list[int] = []

    def interrupted(self, progress):
        if len(epochs) == 3:
            raise KeyboardInterrupt
        epochs.append(self.epoch)
        return original(self, progress)

    monkeypatch.setattr(Trainer, "run_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit(tmp_path / "cut", method="ensemble", particles=3, dropout=0.2)
    epochs.clear()
    cut = run_fit(tmp_path / "cut", method="ensemble", particles=3, dropout=0.2)
    assert epochs == [1, 0, 1]  # of six: the first member and half of the second were there
    assert capsys.readouterr().out.count("resuming from") == 2
    assert cut.fit["history"] == whole.fit["history"] and cut.fit["log_likelihood"] == whole.fit["log_likelihood"]
    for one, other in zip(whole.adapters(3, tmp_path), cut.adapters(3, tmp_path), strict=True):
        first, second = lora.read_adapter(one), lora.read_adapter(other)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluate_and_inspect(run_fit, tiny_base, tmp_path, capsys):
    posterior = run_fit(method="ensemble", particles=3)
    for module, words in ((evaluate, [tmp_path / "data.jsonl", "--base", tiny_base, "--particles", 3]), (inspect, [])):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        module.run(parser.parse_args([str(word) for word in (posterior.path, *words, "--json")]))
        facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "particles" and facts["particles"] == 3
    assert artefact.load(posterior.path).hash == posterior.hash


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prior_precision": "evidence"}, "belongs to --method laplace; ensemble needs a number"),
        ({"adapter": "/nowhere"}, "--adapter belongs to --method laplace, tfb; ensemble"),
        ({"particles": 0}, "--particles is 0"),
        ({"learning_rate": 1e30}, "lower the learning rate"),
    ],
)
def test_bad_input_is_one_sentence(run_fit, options, match):
    with pytest.raises(PosteriorError, match=match) as error:
        run_fit(method="ensemble", **{"particles": 2, **options})
    assert "\n" not in str(error.value)
