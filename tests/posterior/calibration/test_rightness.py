"""P(right) from features: the model against scikit-learn and by hand, records, and the guarantee by simulation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from posterior.calibration import metrics, rightness
from posterior.calibration.metrics import right_auroc, right_ece
from posterior.calibration.rightness import (
    FOLDS,
    PLAIN,
    SAMPLED,
    Features,
    Graded,
    Model,
    TextKey,
    TextRecord,
    epistemic,
    features,
    halves,
    measure,
)
from posterior.errors import PosteriorError
from posterior.predictive.decoding import text_predictive
from posterior.predictive.meanings import meanings

KEY = TextKey(base="sha256:0", posterior="abc", predictive="mixture", particles=8, dtype="bfloat16", text="greedy")
SAMPLES = KEY.model_copy(update={"samples": 8, "meaning": "exact"})


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the bootstrap, which no test here looks at."""
    monkeypatch.setattr(metrics, "RESAMPLES", 20)


def draw(n: int, seed: int = 0, names: tuple[rightness.Feature, ...] = PLAIN) -> Graded:
    """Rows whose log-odds of being right are 2 mean_logprob - 1 + noiseless others that do not matter."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(names), generator=generator, dtype=torch.float64)
    x[:, 0] = -x[:, 0].abs()  # a log-probability
    right = torch.rand(n, generator=generator, dtype=torch.float64) < torch.sigmoid(4 * x[:, 0] + 3)
    rows: list[Features] = [dict(zip(names, row, strict=True)) for row in x.tolist()]
    return Graded(rows, right.tolist())


def made(n: int = 200, key: TextKey = KEY, **changes: Any) -> TextRecord:
    names = SAMPLED if key.samples is not None else PLAIN
    return measure(draw(n, names=names), key=key, data="sha256:1", grading="match", max_tokens=16, **changes)


def test_features_are_what_they_are_called() -> None:
    log_p = torch.tensor([[-1.0, -2.0], [-0.5, -0.1], [-3.0, -1.0]])
    weights = torch.tensor([0.25, 0.75])
    total, aleatoric = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.75, 1.5, 0.5])
    found = features(text_predictive(log_p, weights.log(), "sequence", total, aleatoric))
    whole = math.log(0.25 * math.exp(-4.5) + 0.75 * math.exp(-3.1))
    assert found == pytest.approx({
        "logprob": whole, "mean_logprob": whole / 3, "information": whole - (0.25 * -4.5 + 0.75 * -3.1),
        "entropy": 3.5 / 3, "epistemic": 0.75 / 3, "length": math.log(3),
    })  # fmt: skip
    assert set(found) == set(PLAIN) and epistemic(found) == found["epistemic"]


def test_features_of_samples() -> None:
    text = text_predictive(torch.tensor([[-1.0]]), torch.zeros(1), "sequence", torch.ones(1), torch.ones(1))
    drawn = meanings(torch.full((4, 1), -1.0), torch.zeros(1), [0, 1, 1, 1])
    found = features(text, drawn, 1)
    assert set(found) == set(SAMPLED)
    assert (found["largest_meaning"], found["own_meaning"]) == pytest.approx((0.75, 0.25))
    assert found["semantic_entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert epistemic(found) == found["semantic_epistemic"] == pytest.approx(0, abs=1e-12)
    assert features(text, drawn, None)["own_meaning"] == 0


def test_the_model_is_the_most_probable_one_under_its_prior() -> None:
    rows, right = draw(300)
    x = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
    y = torch.tensor(right)
    model = Model.fit(PLAIN, x, y)
    standard = (x - x.mean(0)) / x.std(0, correction=0)

    def loss(theta: np.ndarray) -> float:
        logit = standard.numpy() @ theta[:-1] + theta[-1]
        return float(np.logaddexp(0, np.where(y, -logit, logit)).sum() + (theta[:-1] ** 2).sum() / 2)

    best = torch.tensor(minimize(loss, np.zeros(len(PLAIN) + 1), tol=1e-10).x)
    weight, intercept = best[:-1], best[-1]
    assert model.weight == pytest.approx(weight.tolist(), abs=1e-4)
    assert model.intercept == pytest.approx(intercept.item(), abs=1e-4)
    assert torch.allclose(model(x), torch.sigmoid(standard @ weight + intercept), atol=1e-5)
    assert torch.equal(model.table(rows), x)


def test_a_feature_that_never_varies_does_no_harm() -> None:
    rows, right = draw(100)
    flat = Graded([{**row, "information": 0.0} for row in rows], right)
    record = measure(flat, key=KEY, data="", grading="match")
    assert all(map(math.isfinite, record.model.weight)) and 0 < record.confidence(flat.features[0]) < 1


def test_cross_fitting_calibrates_and_ranks() -> None:
    record = made(1000)
    rows, right = draw(1000)
    before = torch.tensor([math.exp(row["mean_logprob"]) for row in rows], dtype=torch.float64)
    assert record.before["ece"].value == pytest.approx(right_ece(before, torch.tensor(right)))
    assert record.after["ece"].value < record.before["ece"].value / 2
    assert record.after["auroc"].value == pytest.approx(right_auroc(before, torch.tensor(right)), abs=0.02)
    other = draw(20_000, seed=1)
    p = record.model(record.model.table(other.features))
    assert right_ece(p, torch.tensor(other.right)) < 0.03, "on rows that it has not seen"


def test_what_an_answer_is_told() -> None:
    record = made()
    sure, unsure = ({**draw(1).features[0], "mean_logprob": value, "epistemic": 0.0} for value in (-0.01, -3.0))
    assert record.confidence(sure) > record.confidence(unsure)
    threshold = record.risk.threshold(0.4)
    assert threshold is not None and record.answered(sure, threshold) and not record.answered(unsure, threshold)
    assert not record.unfamiliar(sure) and record.unfamiliar({**sure, "epistemic": 99.0})
    shares = [record.unfamiliar(row) for row in draw(200).features]
    assert 0 < sum(shares) <= 0.05 * 200
    assert record.summary()["features"] == list(PLAIN) and record.summary()["key"]["samples"] is None


def test_the_error_among_texts_that_do_not_abstain_is_at_most_the_one_allowed() -> None:
    """The guarantee over resamplings: at most DELTA = .1 of calibrations may exceed it; 60 calibrations, of which with
    probability .999 at most 14 do if it holds."""
    allowed, exceeded, said = 0.3, 0, 0
    new = draw(20_000, seed=10**6)
    right = torch.tensor(new.right)
    for seed in range(60):
        graded = draw(300, seed=seed)
        own, held = halves(torch.tensor(graded.right), seed)
        x = torch.tensor([list(row.values()) for row in graded.features], dtype=torch.float64)
        y = torch.tensor(graded.right)
        guard = Model.fit(PLAIN, x[own], y[own])
        threshold = rightness.Risk.of(guard(x[held]), y[held]).threshold(allowed)
        if threshold is None:
            continue
        said += 1
        kept = guard(guard.table(new.features)) >= threshold
        exceeded += bool(kept.any()) and float((~right)[kept].double().mean()) > allowed
    assert said > 30 and exceeded <= 14


def test_halves_are_halves_and_the_first_can_be_learnt_from() -> None:
    right = torch.tensor([True] * FOLDS + [False] * 60)
    for seed in range(50):
        own, held = halves(right, seed)
        assert sorted([*own.tolist(), *held.tolist()]) == list(range(65)) and len(own) == 32
        assert right[own].any() and not right[own].all()


@pytest.mark.parametrize(
    ("right", "said"),
    [
        ([True] * 29 + [False] * 29, "58 graded answers are too few to calibrate with; give at least 59"),
        ([True] * 4 + [False] * 60, "4 of the 64 graded answers are right; a calibration needs at least 5 right"),
        ([True] * 60, "0 of the 60 graded answers are wrong"),
    ],
)
def test_answers_that_cannot_calibrate_are_refused(right: list[bool], said: str) -> None:
    rows = draw(len(right)).features
    with pytest.raises(PosteriorError, match=said):
        measure(Graded(rows, right), key=KEY, data="", grading="match")


# Files


def test_records_come_back_from_their_files(tmp_path: Path) -> None:
    given = KEY.model_copy(update={"text": "given"})
    for key in (KEY, SAMPLES, given):
        rightness.save(tmp_path, made(key=key))
    names = {path.name for path in (tmp_path / "calibration").iterdir()}
    assert names == {
        "text-mixture-8-greedy-bfloat16.json", "text-mixture-8-greedy-8-exact-bfloat16.json",
        "text-mixture-8-given-bfloat16.json",
    }  # fmt: skip
    found = rightness.load(tmp_path, base="sha256:0", posterior="abc")
    assert set(found) == {KEY, SAMPLES, given} and found[SAMPLES] == made(key=SAMPLES)
    assert rightness.load(tmp_path / "elsewhere", base="", posterior="") == {}


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        from posterior.calibration import signed

        content = json.loads(path.read_text())
        del content["hash"]
        change(content)
        signed.write(path, content)

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_text(path.read_text().replace("match", "mitch")), "its hash differs"),
        (lambda path: path.write_text("{"), "no readable JSON record"),
        (lambda path: path.rename(path.with_name("text-map-1-greedy-bfloat16.json")), "another posterior"),
        (_edit(lambda content: content["key"].update(posterior="other")), "another posterior"),
        (_edit(lambda content: content["model"]["weight"].pop()), "model: .*different lengths"),
        (_edit(lambda content: content["model"]["scale"].__setitem__(0, 0.0)), "unreadable model.scale.0"),
        (_edit(lambda content: content.update(n=3)), "unreadable n"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(rightness.save(tmp_path, made()))
    with pytest.raises(PosteriorError, match=said) as caught:
        rightness.load(tmp_path, base="sha256:0", posterior="abc")
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    path = rightness.save(tmp_path / "other", made())
    (tmp_path / "own" / "calibration").mkdir(parents=True)
    (tmp_path / "own" / "calibration" / path.name).symlink_to(path)
    with pytest.raises(PosteriorError, match="leads outside"):
        rightness.load(tmp_path / "own", base="sha256:0", posterior="abc")
