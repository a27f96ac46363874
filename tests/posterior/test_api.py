"""The library without a command: rows in, a posterior that predicts, evaluates, calibrates and samples."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import posterior
from posterior.models import lora
from posterior.settings import SettingError, forms

TASK = posterior.Task("choice", "{text}:", ("n", "p"))
ROWS = [{"text": f"row {index} is {('bad', 'good')[index % 2]}", "label": index % 2} for index in range(12)]
HELD = [{"text": f"held {index} is {('bad', 'good')[index % 2]}", "label": (index // 3) % 2} for index in range(80)]
METHODS = (
    posterior.Laplace, posterior.Ensemble, posterior.Svgd, posterior.Dropout, posterior.Swag, posterior.Blob,
    posterior.Ivon, posterior.Tfb,
)  # fmt: skip


@pytest.fixture
def fitted(tiny_base: Path, tmp_path: Path) -> posterior.Posterior:
    method = posterior.Laplace(rank=2, epochs=2, prior_precision=2.0)
    return posterior.fit(ROWS, task=TASK, method=method, base=str(tiny_base), out=tmp_path / "tiny", device="cpu")


def test_all_names_are_there() -> None:
    assert all(getattr(posterior, name).__name__ == name for name in posterior.__all__)
    assert set(posterior.__all__) == set(posterior._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = posterior.nothing


def test_importing_it_imports_no_torch() -> None:
    code = "import posterior, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_fit_equals_the_command_s(run_fit: Any, fitted: posterior.Posterior, tmp_path: Path) -> None:
    command = run_fit(tmp_path / "command", ROWS, prior_precision=2)
    assert fitted.hash == command.hash and fitted.family == "laplace" and fitted.name == "tiny"


def test_predictions_are_those_of_the_evaluation(fitted: posterior.Posterior) -> None:
    """Of all three predictives, against the tables' code on the same rows."""
    inputs = [row["text"] for row in HELD[:5]]
    report = fitted.evaluate(HELD[:5], settings=posterior.Evaluation(particles=3, device="cpu"))
    for predictive, name in (("linearized", "linearized"), ("mixture", "3 particles"), ("map", "MAP")):
        particles = 3 if predictive == "mixture" else None
        answers = fitted.predict(inputs, predictive=predictive, particles=particles)
        expected, _ = report.curves[name]
        torch.testing.assert_close(torch.stack([each.probability for each in answers]), expected, rtol=0, atol=1e-6)
        assert all(each.answers == ("n", "p") and not each.calibrated for each in answers)
    first = fitted.predict([{"text": inputs[0]}])[0]
    assert first.answer in ("n", "p") and first.confidence == float(first.probability.max())
    assert first.predictive.total == pytest.approx(first.predictive.aleatoric + first.predictive.epistemic)


def test_a_calibration_is_applied(fitted: posterior.Posterior) -> None:
    before = fitted.predict(["row 3"])[0]
    (record,) = fitted.calibrate(HELD, posterior.Calibration(predictive="linearized", dtype="float32", device="cpu"))
    after = fitted.predict(["row 3"])[0]
    assert fitted.calibrations == (record,) and after.calibrated and after.calibration == record
    torch.testing.assert_close(after.probability, record.apply(before.probability[None])[0])
    torch.testing.assert_close(after.predictive.probability, before.probability)
    assert not fitted.predict(["row 3"], predictive="map")[0].calibrated
    assert posterior.load(fitted.path, device="cpu").calibrations == (record,)


def test_samples_are_the_folder_s_draws(fitted: posterior.Posterior) -> None:
    draws, mean = fitted.sample(2, seed=1), lora.read_adapter(fitted.path / "map")
    assert len(draws) == 2 and set(draws[0]) == set(mean)
    assert not torch.equal(draws[0]["model.layers.0.self_attn.q_proj.B"], draws[1]["model.layers.0.self_attn.q_proj.B"])
    again = fitted.sample(2, seed=1)
    assert all(torch.equal(draws[0][name], again[0][name]) for name in mean)


def test_particles_without_a_place(tiny_base: Path) -> None:
    found = posterior.fit(
        ROWS, task=TASK, method=posterior.Ensemble(rank=2, steps=1, particles=2), base=str(tiny_base), device="cpu"
    )
    assert found.family == "particles" and (found.path / "posterior.json").is_file()
    answer = found.predict(["row 1"])[0]
    assert answer.predictive.particles == 2
    with pytest.raises(posterior.PosteriorError, match="has no linearized predictive"):
        found.predict(["row 1"], predictive="linearized")


@pytest.mark.parametrize("one", ["row 1", {"text": "row 1"}])
def test_one_input_is_no_list_of_its_parts(fitted: posterior.Posterior, one: Any) -> None:
    assert fitted.predict([]) == []
    with pytest.raises(posterior.PosteriorError, match="put the one input into a list"):
        fitted.predict(one)


def test_text_is_served_not_predicted(run_fit: Any, tmp_path: Path) -> None:
    rows = [{"text": "a", "response": "b"}, {"text": "c", "response": "d"}]
    text = run_fit(tmp_path / "text", rows, task="text", template="{text}", prior_precision=2)
    with pytest.raises(posterior.PosteriorError, match="is a text posterior"):
        posterior.load(text.path, device="cpu").predict(["a"])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_every_number_of_a_method_is_checked(method: Any) -> None:
    """NaN, infinity, a number out of range, and a value of another type, in every field that takes a number."""
    needed: dict[str, Any] = {"dropout": 0.1} if method is posterior.Dropout else {}
    needed |= {"adapter": Path("a")} if method is posterior.Tfb else {}
    method(**needed)
    for name, form in forms(method).items():
        if form.number():
            for value in (math.nan, math.inf, -1, "many", [1]):
                with pytest.raises(SettingError, match=f"^{name} is .*; it must be "):
                    method(**needed | {name: value})


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        (posterior.Laplace, {"epochs": "evidence", "steps": 3}, "epochs evidence and steps both say"),
        (posterior.Laplace, {"grouping": "layer", "structure": "full"}, "grouping layer goes by blocks"),
        (
            posterior.Laplace,
            {"structure": "diagonal", "sharing": "reduce"},
            "sharing belongs to structure full or kfac",
        ),
        (posterior.Laplace, {"adapter": Path("a"), "rank": 4}, "rank is for training an adapter, but adapter"),
        (posterior.Laplace, {"structure": "round"}, "structure is round; it must be 'full' or 'kfac' or 'diagonal'"),
        (posterior.Laplace, {"rslora": 1}, "rslora is 1; it must be true or false"),
        (posterior.Ensemble, {"targets": ()}, "targets is .*a list of texts"),
        (posterior.Ensemble, {"targets": "q_proj"}, "targets is q_proj; it must be a list of texts"),
        (posterior.Dropout, {}, "needs a dropout above 0"),
        (posterior.Calibration, {"coverage": 1.0}, "coverage is 1.0; it must lie between 0 and 1"),
        (posterior.Evaluation, {"device": "cuda:77"}, "torch sees"),
    ],
)
def test_what_a_setting_cannot_be(method: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words) as caught:
        method(**settings)
    assert "--" not in str(caught.value) and "{" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "there are no rows"), (["text"], "row 1 is str, no mapping"), ([{"label": 0}], "row 1: field 'text'")],
)
def test_rows_that_are_none(tiny_base: Path, tmp_path: Path, rows: Any, words: str) -> None:
    with pytest.raises(posterior.PosteriorError, match=words):
        posterior.fit(rows, task=TASK, base=str(tiny_base), out=tmp_path / "x", device="cpu")
    assert not (tmp_path / "x").exists()


def test_no_namespace_below_the_command() -> None:
    """Options end in posterior/cli: the library takes values."""
    root = Path(posterior.__file__).parent
    for path in root.rglob("*.py"):
        if path.relative_to(root).parts[0] != "cli":
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert "argparse" not in names, path
