"""Predictions against one row at a time and dense sums; `posterior evaluate` on a tiny posterior."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from scipy.stats import entropy

from posterior.calibration import metrics
from posterior.cli import evaluate
from posterior.curvature import kfac
from posterior.data.examples import batches, collate
from posterior.errors import PosteriorError
from posterior.evaluation import predictions
from posterior.laplace import blockwise
from posterior.laplace.linearized import moments
from posterior.likelihood.scores import scores
from posterior.models import lora
from posterior.predictive.mixture import from_gaussian
from posterior.storage import artefact
from tests.posterior.conftest import make_examples, summed

ROWS = [{"text": f"row {index} is {'good' if index % 2 else 'bad'}", "label": index % 2} for index in range(12)]
FRESH = [{"text": f"a {'fine' if index % 3 else 'poor'} thing {index}", "label": index % 2} for index in range(40)]


def test_a_point_knows_of_no_epistemic_uncertainty():
    f = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = predictions.point(f)
    torch.testing.assert_close(found.probability, f.exp() / f.exp().sum(1, keepdim=True))
    assert found.epistemic.tolist() == [0.0] * 5
    torch.testing.assert_close(found.total, torch.from_numpy(entropy(found.probability.numpy(), axis=1)))


def test_linearized_is_the_predictive_of_each_row(model):
    """Rows of different lengths, in batches of three, equal to each row alone."""
    examples = make_examples(7)
    matrices = lora.matrices(model)
    curvature = kfac.fit(model, matrices, (batch for _, batch in batches(examples, 4)))
    law = blockwise.Blocks(curvature, dict.fromkeys(curvature, 2.0))
    found = predictions.linearized(model, law, examples, batch_size=3)
    for index, example in enumerate(examples):
        (mean,), ((covariance,),) = moments(model, matrices, law, collate(summed(example)))
        expected = from_gaussian(mean, covariance)
        torch.testing.assert_close(found.probability[index], expected.probability, rtol=1e-6, atol=1e-9)
        assert found.total[index] == pytest.approx(expected.total, rel=1e-6)
        assert found.epistemic[index] == pytest.approx(expected.epistemic, rel=1e-4, abs=1e-9)
        assert 0 < found.epistemic[index] < found.total[index]


def test_long_rows_run_in_smaller_batches(model, monkeypatch):
    """With 32 rows of four long answers at once, the gradients once took all memory there was."""
    monkeypatch.setattr(predictions, "TOKENS", 64)
    examples = make_examples(9, answers=4, tokens=2, length=(2, 12))
    curvature = kfac.fit(model, lora.matrices(model), [collate(examples)])
    law = blockwise.Blocks(curvature, dict.fromkeys(curvature, 2.0))
    sizes = []
    model.register_forward_pre_hook(
        lambda _model, _args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    predictions.map_scores(model, examples)
    predictions.linearized(model, law, examples)
    assert len(sizes) > 4 and max(sizes) <= 64


@pytest.fixture
def gang(run_fit, tmp_path):
    """Three particles with different weights, around a fitted adapter."""
    source = run_fit()
    mean = lora.read_adapter(source.map_dir)
    particles = [{name: value + step for name, value in mean.items()} for step in (-0.2, 0.0, 0.3)]
    return artefact.save(
        tmp_path / "gang", family="particles", base=source.base, task=source.task, prior={}, fit={}, mean=mean,
        lora_config=lora.read_config(source.map_dir), particles=particles, weights=[0.2, 0.3, 0.5],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("k", "weights"), [(1, [1.0]), (2, [0.625, 0.375]), (3, [0.5, 0.3, 0.2]), (8, [0.5, 0.3, 0.2])]
)
def test_sampled_is_the_mixture_of_the_particles_there_are(gang, tiny_base, k, weights):
    """Entropies by their definitions; the model is left as it was."""
    from posterior.models.base import load_model, resolve

    model = lora.load_peft(load_model(resolve(str(tiny_base)), torch.float32, "cpu"), gang.map_dir).eval()
    examples, before = make_examples(5), lora.get(model)
    found = predictions.sampled(model, gang, k, examples, batch_size=2)
    assert all(torch.equal(before[name], value) for name, value in lora.get(model).items())
    members = []
    for folder in gang.adapters(len(weights), gang.path):
        lora.put(model, lora.read_adapter(folder))
        with torch.no_grad():
            f = torch.cat([scores(model, collate(summed(one))) for one in examples])
            members.append(f.double().softmax(1).numpy())
    mixture = sum(weight * p for weight, p in zip(weights, members, strict=True))
    conditional = sum(weight * entropy(p, axis=1) for weight, p in zip(weights, members, strict=True))
    torch.testing.assert_close(found.probability, torch.from_numpy(mixture), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.total, torch.from_numpy(entropy(mixture, axis=1)), rtol=1e-5, atol=1e-7)
    expected = torch.from_numpy(entropy(mixture, axis=1) - conditional)
    torch.testing.assert_close(found.epistemic, expected, rtol=1e-3, atol=1e-6)
    assert float(found.epistemic.min()) > 0 or k == 1


@pytest.fixture
def call(tiny_base, tmp_path):
    def call(folder, rows, *words, **files):
        for name, content in {"data": rows, **files}.items():
            text = "".join(json.dumps(row) + "\n" for row in content)
            (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        given = [word for name in files for word in (f"--{name}", tmp_path / f"{name}.jsonl")]
        parser = argparse.ArgumentParser()
        evaluate.add_arguments(parser)
        options = [folder, tmp_path / "data.jsonl", "--base", tiny_base, "--particles", 3, *given, *words]
        return evaluate.run(parser.parse_args(list(map(str, options))))

    return call


def test_markdown(run_fit, call, capsys):
    posterior = run_fit()
    call(posterior.path, FRESH)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| 40 rows | " + " | ".join(metrics.METRICS) + " |" and lines[1] == "|---" * 9 + "|"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| MAP", "| linearized", "| 3 particles"]
    call(posterior.path, FRESH, calibration=ROWS, ood=[{"text": "1 + 1"}, {"text": "2 x 3", "label": "six"}])
    tables = capsys.readouterr().out.split("\n\n")[-3:]
    assert [table.splitlines()[0] for table in tables] == [
        "| prediction sets at coverage 0.9 | covered | size |",
        "| answers with an error of at most 0.05 | threshold | answered | wrong |",
        "| OOD AUROC | epistemic entropy | total entropy |",
    ]


def test_repeated_rows_are_counted(run_fit, call, capsys):
    posterior = run_fit()
    call(posterior.path, FRESH, "--json", calibration=[row | {"source": "another"} for row in FRESH[:3]] + ROWS)
    output = capsys.readouterr()
    assert "warning: 3 of 40 test rows are calibration rows too" in output.err
    assert json.loads(output.out)["repeated"] == 3
    call(posterior.path, FRESH, calibration=ROWS)
    assert "warning" not in capsys.readouterr().err
    call(posterior.path, FRESH + [row | {"source": "another"} for row in ROWS[:5]])
    assert "warning: 5 of 45 test rows are rows that 'tiny' was fitted on" in capsys.readouterr().err


def test_particles_are_those_of_the_folder(gang, call, capsys):
    call(gang.path, FRESH, "--particles", 8, "--json")
    assert list(json.loads(capsys.readouterr().out)["table"]) == ["MAP", "3 particles"]


def test_what_is_undefined_or_infinite_is_null(gang, call, capsys, monkeypatch):
    """Every answer right and certain, then wrong and certain: no AUROC, and an infinite NLL."""
    certain = torch.tensor([[200.0, -1000.0]], dtype=torch.float64)
    monkeypatch.setattr(predictions, "map_scores", lambda model, examples, batch_size: certain.expand(len(examples), 2))
    for label in (0, 1):
        call(gang.path, [row | {"label": label} for row in FRESH], "--json")
        found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["table"]["MAP"]
        assert found["auroc"] == {"value": None, "low": None, "high": None}
        assert found["nll"]["value"] == (None if label else 0.0)


def test_refusals(gang, run_fit, call, tmp_path, monkeypatch):
    monkeypatch.setattr("posterior.evaluation.evaluate.load_model", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(PosteriorError, match="there is no folder .*nowhere; make it first"):
        call(gang.path, FRESH, "--report", tmp_path / "nowhere" / "r.html")
    with pytest.raises(PosteriorError, match="row 1: field 'text' is missing"):
        call(gang.path, FRESH, ood=[{"question": "1 + 1"}])


def test_a_predictive_that_is_not_finite(gang, call, monkeypatch):
    nan = torch.full((1, 2), float("nan"), dtype=torch.float64)
    monkeypatch.setattr(predictions, "map_scores", lambda model, examples, batch_size: nan.expand(len(examples), 2))
    with pytest.raises(PosteriorError, match="not finite; try float32"):
        call(gang.path, FRESH)
