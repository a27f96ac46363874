"""`posterior fit`, `evaluate` and `inspect` from end to end on a tiny base."""

from __future__ import annotations

import argparse
import errno
import json
import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from posterior.cli import evaluate, fit, inspect
from posterior.data.scoring import Scoring
from posterior.errors import PosteriorError
from posterior.laplace import gaussian
from posterior.models import lora
from posterior.storage import artefact
from tests.posterior.conftest import tiny_llama

ROWS = [{"text": f"row {index} is {'good' if index % 2 else 'bad'}", "label": index % 2} for index in range(12)]


def test_fit_writes_a_loadable_posterior(run_fit):
    posterior = run_fit()
    assert posterior.prior["choice"] == "evidence" and set(posterior.prior["precision"]) == {"all"}
    assert posterior.fit["data"]["rows"] == 12 and posterior.fit["log_likelihood"] < 0
    assert not list(posterior.path.parent.glob(".*checkpoint"))


def test_same_seed_same_posterior_another_seed_another(run_fit, tmp_path):
    thetas = [
        lora.read_adapter(run_fit(tmp_path / name, seed=seed).map_dir) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert all(torch.equal(thetas[0][name], thetas[1][name]) for name in thetas[0])
    assert not all(torch.equal(thetas[0][name], thetas[2][name]) for name in thetas[0])


def test_the_adapter_is_ordinary_peft(run_fit, tiny_base):
    posterior = run_fit(rslora=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(posterior.map_dir))
    ours = lora.load_peft(AutoModelForCausalLM.from_pretrained(tiny_base), posterior.map_dir)
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, ours(tokens).logits)


def test_an_interrupted_fit_goes_on(run_fit, tmp_path, monkeypatch, capsys):
    """Killed after the first epoch, the second run resumes and ends where an uninterrupted one does."""
    whole = run_fit(tmp_path / "whole")
    original = gaussian.measure
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(gaussian, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_fit(tmp_path / "cut")
    monkeypatch.setattr(gaussian, "measure", original)
    cut = run_fit(tmp_path / "cut")
    assert "resuming from" in capsys.readouterr().out
    first, second = lora.read_adapter(whole.map_dir), lora.read_adapter(cut.map_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert cut.precision == whole.precision


def test_laplace_of_somebody_elses_adapter(run_fit, tmp_path):
    trained = run_fit(tmp_path / "trained", no_variational=True)
    post_hoc = run_fit(tmp_path / "post-hoc", adapter=trained.map_dir)
    first, second = lora.read_adapter(trained.map_dir), lora.read_adapter(post_hoc.map_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert post_hoc.prior["grouping"] == "scalar" and post_hoc.fit["training"] is None
    for name, block in post_hoc.curvature.items():  # same adapter, same data: the same curvature
        torch.testing.assert_close(block.large.values, trained.curvature[name].large.values)


@pytest.mark.parametrize(
    "options",
    [
        {"sharing": "reduce"},
        {"curvature_rank": 4},
        {"curvature_rank": "whole"},
        {"grouping": "layer"},
        {"structure": "full", "prior_precision": "7"},
        {"prior_precision": "7"},
        {"no_variational": True},
    ],
)
def test_variants(run_fit, options):
    posterior = run_fit(**options)
    if "prior_precision" in options:
        assert {value for name, value in posterior.precision.items() if name.endswith(".B")} == {7.0}


def test_a_keeps_the_precision_of_its_initialisation(run_fit):
    posterior = run_fit()
    theta = lora.read_adapter(posterior.map_dir)
    for name, value in posterior.precision.items():
        if name.endswith(".A"):
            assert value == 3.0 * theta[name].shape[1]
    wide = lora.attach(tiny_llama(), rank=64, seed=0)  # peft draws A with that variance: 5 standard errors
    for name, value in lora.get(wide).items():
        if name.endswith(".A"):
            assert float(value.var()) == pytest.approx(1 / (3 * value.shape[1]), rel=0.15)


def test_the_data_determine_no_more_than_their_number(run_fit, tmp_path):
    """12 rows of two answers are 12 directions, however many matrices: also when the prior is weak."""
    for choice in ("evidence", "0.001"):
        posterior = run_fit(tmp_path / choice, prior_precision=choice)
        assert posterior.fit["coupling"] > 1 and 0 < posterior.fit["effective_dimension"] < 12


def test_the_variational_mean_is_not_the_mode(run_fit, tmp_path):
    mean, mode = run_fit(tmp_path / "mean"), run_fit(tmp_path / "mode", no_variational=True)
    assert mean.fit["variational"] and not mode.fit["variational"]
    first, second = lora.read_adapter(mean.map_dir), lora.read_adapter(mode.map_dir)
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_heldout_precision(run_fit, tmp_path):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert run_fit(prior_precision="heldout", heldout=heldout).prior["choice"] == "heldout"


def test_text_task(run_fit):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "ok"}]} for n in range(6)
    ]
    posterior = run_fit(rows=rows, task="text")
    assert posterior.task.kind == "text" and posterior.task.answers is None and posterior.width == 1


def test_heldout_rows_that_are_training_rows_are_counted(run_fit, tmp_path, capsys):
    heldout = tmp_path / "heldout.jsonl"
    fresh = [{"text": "new and good", "label": 1}, {"text": "new and bad", "label": 0}]
    for rows, warned in ((ROWS[:3] + fresh, True), (fresh, False)):
        heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run_fit(tmp_path / str(warned), prior_precision="heldout", heldout=heldout)
        assert ("warning: 3 of 5 held-out rows are training rows too" in capsys.readouterr().err) == warned


def test_bfloat16_on_a_cpu_without_it_is_warned_of(run_fit, monkeypatch, capsys):
    for capability, dtype in (("AVX2", "bfloat16"), ("AVX2", "float32"), ("AVX512", "bfloat16")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        run_fit(method="ensemble", particles=1, steps=1, device="cpu", dtype=dtype)
        warned = "warning: this CPU does not multiply bfloat16" in capsys.readouterr().err
        assert warned == ((capability, dtype) == ("AVX2", "bfloat16"))


def test_rows_of_one_answer_need_a_fixed_prior(run_fit, capsys):
    rows = [{"text": f"row {index}", "label": 1} for index in range(4)]
    with pytest.raises(PosteriorError, match="every row has the answer 'p', which is no evidence of a prior"):
        run_fit(rows=rows)
    assert run_fit(rows=rows, prior_precision="7").prior["choice"] == "7"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: every row")]
    assert "every row has the answer 'p'" in line


def test_a_diverged_fit_begins_anew_with_a_lower_rate(run_fit, tmp_path, capsys):
    """The message names the step and the checkpoint, and what it says of both rates is true."""
    options = {"method": "ensemble", "particles": 1, "batch_size": 12, "epochs": 3}
    for _ in range(2):  # the same command goes on from the checkpoint, and fails at the same step
        with pytest.raises(PosteriorError, match=r"at step 2; .* begin anew: the checkpoint after epoch 2 would lead"):
            run_fit(tmp_path / "it", learning_rate=1e30, **options)
    assert capsys.readouterr().out.count("resuming from") == 1
    run_fit(tmp_path / "it", learning_rate=1e-3, **options)
    assert "resuming from" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prior_precision": "-1"}, "--prior-precision is -1.0; it must be .* above 0"),
        ({"prior_precision": "nan"}, "--prior-precision is nan; it must be .* above 0"),
        ({"prior_precision": "heldout"}, "go together"),
        ({"scale": "0"}, "--scale is 0.0; it must be .* above 0"),
        ({"scale": "evidence", "method": "swag"}, "--scale evidence belongs to --method laplace; swag needs a number"),
        ({"scale": "evidence", "adapter": "a"}, "--scale evidence is for an adapter that laplace trains"),
        ({"scale": "2", "task": "text"}, "a text has none"),
        ({"rank": 0}, "--rank is 0"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"targets": ["nothing"]}, "do not fit this base"),
        ({"adapter": "/nowhere"}, "no PEFT adapter"),
        ({"answers": ["p", "p"]}, "tokenise alike"),
        ({"learning_rate": 1e30}, "lower the learning rate"),
        ({"learning_rate": "nan"}, "--learning-rate is nan"),
        ({"learning_rate": -1}, "--learning-rate is -1"),
        ({"learning_rate": "inf"}, "--learning-rate is inf"),
        ({"steps": 0}, "--steps is 0"),
        ({"steps": -1}, "--steps is -1"),
        ({"alpha": 0}, "--alpha is 0"),
        ({"dropout": "nan"}, "--dropout is nan"),
        ({"dropout": 1}, "--dropout is 1"),
        ({"seed": -1}, "--seed is -1"),
        ({"seed": 2**70}, "--seed is 1180591620717411303424"),
        ({"rank": 10**9}, "--rank is 1000000000; it must be at least 1 and at most 512"),
        ({"epochs": 10**9}, "--epochs is 1000000000"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"batch_size": 10**12}, "--batch-size is 1000000000000"),
        ({"curvature_rank": 10**12}, "--curvature-rank is 1000000000000"),
        ({"label_samples": 0}, "--label-samples is 0"),
        ({"max_length": 0}, "--max-length is 0"),
        ({"max_length": 129}, "--max-length is 129, but the context of base tiny-llama is 128 tokens"),
        ({"max_length": 5}, "row 1 has 13 tokens, more than the maximum length of 5; shorten"),
        ({"device": "gpu"}, "--device is 'gpu'"),
        ({"device": "cuda:77"}, "--device cuda:77: torch sees"),
        ({"template": r"{text}\sum"}, r"--template holds"),
        ({"answers": [r"\yes", "no"]}, r"--answers holds"),
        ({"method": "svgd", "temperature": "inf"}, "--temperature is inf"),
    ],
)
def test_bad_input_is_one_sentence(run_fit, options, match):
    with pytest.raises(PosteriorError, match=match) as error:
        run_fit(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--prior-precision", "often"), "'often' is neither 'evidence', 'heldout' nor a number"),
        (("--scale", "small"), "'small' is neither 'evidence' nor a number"),
        (("--rank", "1.5"), "'1.5' is not a whole number"),
        (("--curvature-rank", "most"), "'most' is neither 'whole' nor a whole number"),
    ],
)
def test_what_is_no_number_is_named(option, message, capsys):
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["rows.jsonl", "--out", "x", *option])
    assert message in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(run_fit, monkeypatch, tmp_path):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("posterior.fitting.artefact.save", full)
    with pytest.raises(PosteriorError, match="disk of .*here is full"):
        run_fit(tmp_path / "here", steps=1)


def test_the_first_prompt_is_shown_as_it_is_read(run_fit, capsys):
    run_fit(template=r"\\nabla {text}\n", steps=1)
    lines = capsys.readouterr().err.splitlines()
    assert r"first prompt: '\\nabla row 0 is bad\n'" in lines
    assert "its answers, token by token: 'n'; 'p'" in lines


def test_an_adapter_of_another_base_is_named(run_fit, tmp_path, capsys):
    trained = run_fit(tmp_path / "trained", no_variational=True)
    named = "names its base"
    run_fit(tmp_path / "same", adapter=trained.map_dir)
    assert named not in capsys.readouterr().err
    path = trained.map_dir / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "somebody/else"}))
    run_fit(tmp_path / "other", adapter=trained.map_dir)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if named in line]
    assert line == f"warning: {trained.map_dir} names its base 'somebody/else'; it is taken for 'tiny-llama'"


def test_evaluate_reads_as_long_as_the_base_can(run_fit, tiny_base, tmp_path, capsys):
    """Whatever --max-length the fit had; what is too long for the base names the file and the row."""
    posterior = run_fit(max_length=20)
    data = tmp_path / "long.jsonl"
    for count, fits in ((100, True), (130, False)):
        rows = [{"text": "x" * count, "label": 1}, {"text": "y", "label": 0}]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if fits:
            call(evaluate, posterior.path, data, "--base", tiny_base, "--particles", 1)
            assert "| 2 rows |" in capsys.readouterr().out
        else:
            with pytest.raises(PosteriorError, match="long.jsonl, row 1 has 131 tokens, more than the base's context"):
                call(evaluate, posterior.path, data, "--base", tiny_base)


@pytest.mark.parametrize("options", [["--particles", 0], ["--batch-size", -1], ["--device", "tpu"], ["--report", "."]])
def test_evaluate_refuses_before_it_reads(options):
    with pytest.raises(PosteriorError, match=options[0]):
        call(evaluate, "/nowhere", "/nowhere.jsonl", *options)


def call(module, *words: object) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    module.run(parser.parse_args(list(map(str, words))))


def test_evaluate_and_inspect(run_fit, tiny_base, tmp_path, capsys):
    posterior = run_fit()
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    call(evaluate, posterior.path, data, "--base", tiny_base, "--calibration", data, "--json", "--particles", 3)
    table = json.loads(capsys.readouterr().out)["table"]
    assert [method.split(",")[0] for method in table] == ["MAP", "MAP", "linearized", "3 particles"]
    assert table["MAP"]["nll"]["value"] > 0
    call(evaluate, posterior.path, data, "--base", tiny_base)
    assert "| 12 rows | accuracy | nll |" in capsys.readouterr().out
    call(inspect, posterior.path)
    shown = capsys.readouterr().out
    assert "(verified)" in shown and "{" not in shown.replace(posterior.task.template, "")
    evidence = format(posterior.fit["evidence"], ".5g")
    assert re.search(rf"^  evidence +{re.escape(evidence)}$", shown, re.MULTILINE)
    call(inspect, posterior.path, "--json")
    assert json.loads(capsys.readouterr().out)["family"] == "laplace"
    assert inspect.describe(posterior)["answers"] == posterior.task.answers
    questions = replace(posterior, task=replace(posterior.task, answers=None))
    assert inspect.describe(questions)["answers"] == "each row's choices"


def test_linearized_model_serves_many_posteriors(run_fit, tiny_base, tmp_path):
    """Prompts of different lengths and candidate sets, in order, equal to one at a time."""
    from posterior.laplace.linearized import LinearizedModel
    from posterior.models.base import resolve

    posteriors = {name: run_fit(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    model = LinearizedModel(resolve(str(tiny_base)), posteriors)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 6, 7]]
    answers = [((20,), (21,)), ((20,), (21,), (22,)), ((20, 21), (22,)), ((20,), (21,))]
    for name in ("a", "b", "a"):
        together = model.logits(name, prompts, answers)
        for index, (mean, covariance) in enumerate(together):
            (alone_mean, alone_covariance), *_ = model.logits(
                name, prompts[index : index + 1], answers[index : index + 1]
            )
            torch.testing.assert_close(mean, alone_mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(covariance, alone_covariance, rtol=1e-4, atol=1e-6)
    assert not torch.equal(model.logits("a", prompts, answers)[0][0], model.logits("b", prompts, answers)[0][0])
    halved = replace(posteriors["a"], task=replace(posteriors["a"].task, scoring=Scoring(scale=0.5)))
    scaled = LinearizedModel(resolve(str(tiny_base)), {"a": halved}).logits("a", prompts, answers)
    for (mean, covariance), (half, quarter) in zip(model.logits("a", prompts, answers), scaled, strict=True):
        torch.testing.assert_close(half, mean / 2, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(quarter, covariance / 4, rtol=1e-4, atol=1e-6)
    assert artefact.load(posteriors["a"].path).hash == posteriors["a"].hash
