"""The mathematics of calibration against grids, simulation and MAPIE; the record's file against damage."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from posterior.calibration import conformal, metrics, records, scalers
from posterior.calibration.conformal import MIN_ROWS, Conformal
from posterior.calibration.records import Key, Record
from posterior.calibration.scalers import CALIBRATORS, Isotonic, Platt, Temperature, Vector
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.evaluation.calibrate import cross_fit, measure
from posterior.files import atomic

TASK = Task("choice", "{text}:", ("a", "b", "c"))
KEY = Key(
    base="sha256:00",
    posterior="11",
    template=records.template_hash(TASK),
    predictive="mixture",
    particles=8,
    dtype="float32",
)


def draw(n: int, seed: int = 0, c: int = 3, sharpness: float = 2.5) -> tuple[Tensor, Tensor]:
    """Over-confident probabilities [n, c] and labels [n] that follow softer ones; the last answer is favoured."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, c, generator=generator, dtype=torch.float64) * 1.5
    y = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
    return (scores * sharpness + torch.arange(c)).softmax(1), y


@cache
def make(n: int = 80, **changes: Any) -> Record:
    p, y = draw(n)
    options: dict[str, Any] = {"method": "temperature", "score": "lac", "coverage": 0.9, "key": KEY} | changes
    return measure(p, y, data="sha256:22", **options)


def test_temperature_is_the_best_of_a_grid() -> None:
    p, y = draw(500)
    found = Temperature.fit(p, y).temperature
    grid = torch.linspace(0.2, 8, 4000, dtype=torch.float64)
    losses = [metrics.nll((p.log() / t).softmax(1), y) for t in grid]
    assert found == pytest.approx(float(grid[int(np.argmin(losses))]), abs=4e-3)
    assert found > 1.5, "the probabilities are over-confident"


def test_vector_scaling_is_the_optimum_and_improves_its_own_rows() -> None:
    p, y = draw(300)
    found = Vector.fit(p, y)
    after = found.apply(p)
    assert metrics.nll(after, y) < metrics.nll(Temperature.fit(p, y).apply(p), y) < metrics.nll(p, y)
    parameters = torch.tensor([found.scale, found.bias], dtype=torch.float64, requires_grad=True)
    log_q = (p.log() * parameters[0] + parameters[1]).log_softmax(1)
    prior = ((parameters[0] - 1).square().sum() + parameters[1].square().sum()) / 2
    (gradient,) = torch.autograd.grad(prior - log_q.gather(1, y[:, None]).sum(), parameters)
    assert float(gradient.abs().max()) / len(y) < 1e-4, "autograd finds no way down"


def test_isotonic_is_monotone_never_certain_and_its_blocks_are_frequencies() -> None:
    p, y = draw(400)
    found = Isotonic.fit(p, y)
    grid = torch.linspace(0.34, 1, 500, dtype=torch.float64)
    rows = torch.stack([grid, (1 - grid) / 2, (1 - grid) / 2], 1)
    q = found.apply(rows)[:, 0]
    assert bool((q.diff() >= -1e-9).all()) and 1 / 402 <= float(q.min()) <= float(q.max()) <= 401 / 402 + 1e-9
    after, right = found.apply(p).max(1).values.round(decimals=9), (p.argmax(1) == y).double()
    for level in after.unique():
        if 0.334 < level < 0.99:  # of three answers the top one has a third or more
            assert float(right[after == level].mean()) == pytest.approx(float(level))


def test_platt_is_the_optimum_of_softened_labels() -> None:
    p, y = draw(300)
    found = Platt.fit(p, y)
    right = p.argmax(1) == y
    target = torch.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2)).double()
    parameters = torch.tensor([found.slope, found.intercept], dtype=torch.float64, requires_grad=True)
    z = p.max(1).values.logit() * parameters[0] + parameters[1]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, target)
    (gradient,) = torch.autograd.grad(loss, parameters)
    assert float(gradient.abs().max()) < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_a_confidence_leaves_the_answer_and_the_order(seed: int) -> None:
    """Of three answers or more. What is taken from the top answer is a temperature's, found here by scipy."""
    p, _ = draw(40, seed=seed, c=4)
    top, wanted = p.max(1).values, torch.linspace(0.26, 0.99, 40, dtype=torch.float64)
    q = scalers._with_confidence(p, wanted)
    assert torch.allclose(q.max(1).values, wanted, atol=1e-9) and torch.allclose(q.sum(1), torch.ones(40).double())
    assert torch.equal(q.argsort(1), p.argsort(1))
    for old, new, confidence, before in zip(p, q, wanted.tolist(), top.tolist(), strict=True):
        if confidence > before:
            factor = new / old
            assert factor[old == before].tolist() == pytest.approx([confidence / before])
            assert factor[old < before].tolist() == pytest.approx([(1 - confidence) / (1 - before)] * 3)
        else:
            t = brentq(lambda t, old=old, c=confidence: float((old.log() / t).softmax(0).max()) - c, 1, 1e6)
            assert torch.allclose(new, (old.log() / t).softmax(0), atol=1e-9)


def test_a_confidence_below_chance() -> None:
    four = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    q = scalers._with_confidence(four, torch.tensor(0.1).double())
    assert 0.25 < float(q.max()) < 0.25001 and torch.equal(q.argsort(), four.argsort()), "the answer stays"
    two = scalers._with_confidence(torch.tensor([0.7, 0.3]).double(), torch.tensor(0.4).double())
    assert two.tolist() == pytest.approx([0.4, 0.6]), "of two, the other one must be likelier"


def test_a_lower_confidence_is_still_true_of_the_answer_that_is_given() -> None:
    """Far too sure of one of four: the share of right answers is what Platt's confidence says, on rows not seen."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    y = torch.multinomial((scores / 2).softmax(1), 1, generator=generator)[:, 0]
    p = (4 * scores).softmax(1)
    q = Platt.fit(p[:1000], y[:1000]).apply(p)
    assert metrics.accuracy(q, y) == metrics.accuracy(p, y)
    assert abs(metrics.signed_gap(q[1000:], y[1000:])) < 0.04 < metrics.signed_gap(p[1000:], y[1000:]) / 5
    assert metrics.nll(q[1000:], y[1000:]) < math.log(4), "a second answer that passed the first made it worse"


def test_methods_of_the_top_answer_stay_finite_when_every_answer_is_right() -> None:
    p, _ = draw(100)
    for method in (Isotonic, Platt, Vector):
        q = method.fit(p, p.argmax(1)).apply(p)
        assert bool(torch.isfinite(q).all()) and float(q.max(1).values.min()) < 1


@pytest.mark.parametrize("method", CALIBRATORS)
def test_every_method_gives_distributions_on_any_shape_and_certainty(method: scalers.Method) -> None:
    calibrator = CALIBRATORS[method].fit(*draw(100))
    hard = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1 / 3] * 3], dtype=torch.float64)
    for p in (hard, hard[0], hard[None, None], draw(20, seed=1)[0]):
        q = calibrator.apply(p)
        assert q.shape == p.shape and bool((q >= 0).all())
        assert torch.allclose(q.sum(-1), torch.ones(p.shape[:-1], dtype=torch.float64))


@pytest.mark.parametrize("method", CALIBRATORS)
def test_calibration_helps_on_rows_it_did_not_see(method: scalers.Method) -> None:
    calibrator = CALIBRATORS[method].fit(*draw(1000))
    p, y = draw(4000, seed=1)
    q = calibrator.apply(p)
    assert metrics.ece(q, y) < metrics.ece(p, y) / 2 and metrics.nll(q, y) < metrics.nll(p, y)


@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize(("n", "coverage"), [(59, 0.9), (100, 0.8), (200, 0.95)])
def test_coverage_over_calibration_sets(score: conformal.Score, n: int, coverage: float) -> None:
    """Over seeds, the true answer is covered with probability k / (n + 1), k = ceil((n + 1) coverage), or above by
    ties, within five standard errors (the coverage of one calibration set is Beta(k, n + 1 - k))."""
    seeds, fresh = 400, 200
    k = math.ceil((n + 1) * coverage - 1e-9)
    hits = []
    for seed in range(seeds):
        p, y = draw(n + fresh, seed=seed)
        sets = Conformal.fit(score, p[:n], y[:n]).sets(p[n:], coverage)
        hits.append(float(sets.gather(1, y[n:, None]).double().mean()))
    expected, beta = k / (n + 1), k * (n + 1 - k) / ((n + 1) ** 2 * (n + 2))
    error = math.sqrt((beta + expected * (1 - expected) / fresh) / seeds)
    assert abs(np.mean(hits) - expected) < 5 * error


def test_lac_is_mapie() -> None:
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
        """A classifier whose inputs are its probabilities."""

        classes_ = np.arange(3)
        fitted_ = True

        def fit(self, x: Any, y: Any) -> Given:
            return self

        def predict_proba(self, x: Any) -> Any:
            return x

        def predict(self, x: Any) -> Any:
            return x.argmax(1)

    p, y = draw(300)
    theirs = SplitConformalClassifier(Given(), confidence_level=[0.7, 0.9], conformity_score="lac", prefit=True)
    theirs.conformalize(p[:99].numpy(), y[:99].numpy())
    _, expected = theirs.predict_set(p[99:].numpy())
    ours = Conformal.fit("lac", p[:99], y[:99])
    for index, coverage in enumerate((0.7, 0.9)):
        assert (ours.sets(p[99:], coverage).numpy() == expected[:, :, index]).all()


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_grow_with_coverage_and_end_with_every_answer(score: conformal.Score) -> None:
    record = make(score=score)
    p, _ = draw(200, seed=1)
    last = torch.zeros_like(p, dtype=torch.bool)
    for coverage in (0.01, 0.3, 0.6, 0.8, 0.9, 0.95, 80 / 81, 0.999):
        sets = record.prediction_set(p, coverage)
        assert bool((sets | ~last).all()), "nested"
        assert bool(sets.any(1).all()), "never empty"
        last = sets
    assert bool(last.all()), "80 rows promise no more than 80/81"


def test_aps_adds_answers_by_probability() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.05, 0.85]], dtype=torch.float64)
    conformal = Conformal(score="aps", scores=(0.0, 0.6, 0.9))
    assert conformal.sets(p, 0.5).tolist() == [[True, True, False], [False, False, True]]
    assert conformal.sets(p, 0.25).tolist() == [[True, False, False], [False, False, True]]


def test_the_quantile_is_the_finite_sample_one() -> None:
    conformal = Conformal(score="lac", scores=tuple(i / 100 for i in range(1, 60)))
    assert conformal.threshold(0.9) == 0.54, "ceil(60 * 0.9) = 54"
    assert conformal.threshold(59 / 60) == 0.59
    assert conformal.threshold(0.99) == math.inf
    assert 0.95**MIN_ROWS <= 0.05 < 0.95 ** (MIN_ROWS - 1)


def test_a_long_calibration_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalers, "MAX_NUMBERS", 512)
    p, y = draw(6000)
    conformal = Conformal.fit("lac", p, y)
    assert len(conformal.scores) == scalers.MAX_NUMBERS
    assert conformal.threshold(0.9) == pytest.approx(float((1 - p.gather(1, y[:, None])).quantile(0.9)), abs=0.03)
    record = make(600, method="isotonic")
    assert (record.n, len(record.conformal.scores)) == (600, scalers.MAX_NUMBERS)


def test_what_is_reported_is_cross_fitted() -> None:
    """Labels without any relation to p: seen rows look calibrated by isotonic regression, unseen ones less so."""
    p, _ = draw(150)
    y = torch.randint(3, (150,), generator=torch.Generator().manual_seed(5))
    after, sets = cross_fit(p, y, method="isotonic", score="lac", coverage=0.9)
    seen = Isotonic.fit(p, y).apply(p)
    assert metrics.nll(after, y) > metrics.nll(seen, y)
    assert sets.shape == p.shape and float(sets.gather(1, y[:, None]).double().mean()) > 0.8


def test_refusals() -> None:
    p, _ = draw(80)
    options: dict[str, Any] = {"score": "lac", "coverage": 0.9, "key": KEY, "data": ""}
    with pytest.raises(PosteriorError, match="all 80 answers are right.*the method platt"):
        measure(p, p.argmax(1), method="temperature", **options)
    assert measure(p, p.argmax(1), method="platt", **options).n == 80
    with pytest.raises(PosteriorError, match="not finite"):
        measure(p * math.nan, p.argmax(1), method="platt", **options)


# Files


def save(folder: Path, record: Record) -> Path:
    folder.mkdir(exist_ok=True)
    return records.save(folder, record)


def load(folder: Path, **changes: Any) -> dict[Key, Record]:
    return records.load(folder, **{"base": KEY.base, "posterior": KEY.posterior, "task": TASK} | changes)


@pytest.mark.parametrize("method", CALIBRATORS)
def test_round_trip_is_exact(tmp_path: Path, method: scalers.Method) -> None:
    record = make(method=method, score="aps")
    path = save(tmp_path / "f", record)
    assert path.name == "mixture-8-float32.json" and load(tmp_path / "f") == {KEY: record}
    assert [file.name for file in path.parent.iterdir()] == ["mixture-8-float32.json"], "no temporary file stays"


def test_answers_that_rows_bring_are_counted(tmp_path: Path) -> None:
    task = Task("choice", "{text}:")
    keys = [KEY.model_copy(update={"template": records.template_hash(task), "answers": n}) for n in (3, 4)]
    paths = [save(tmp_path, make(key=key)) for key in keys]
    assert [path.name for path in paths] == ["mixture-8-3-float32.json", "mixture-8-4-float32.json"]
    assert set(load(tmp_path, task=task)) == set(keys)


def test_a_count_of_answers_that_the_task_fixes_is_refused(tmp_path: Path) -> None:
    save(tmp_path, make(key=KEY.model_copy(update={"answers": 3})))
    with pytest.raises(PosteriorError, match="calibrates another posterior or predictive"):
        load(tmp_path)


def test_no_calibration_and_several(tmp_path: Path) -> None:
    assert load(tmp_path) == {}
    other = KEY.model_copy(update={"particles": 4})
    save(tmp_path, make())
    save(tmp_path, make(key=other))
    newer = make(method="platt")
    save(tmp_path, newer)
    assert set(load(tmp_path)) == {KEY, other} and load(tmp_path)[KEY] == newer


@pytest.mark.parametrize(
    "other",
    [{"base": "sha256:99"}, {"posterior": "99"}, {"task": Task("choice", "{text}?", ("a", "b", "c"))},
     {"task": Task("choice", "{text}:", ("a", "b", "d"))}, {"task": Task("choice", "{text}:", ("a", "b", "c"), True)}],
)  # fmt: skip
def test_a_record_of_another_posterior_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    save(tmp_path, make())
    with pytest.raises(PosteriorError, match="calibrates another posterior") as error:
        load(tmp_path, **other)
    assert "\n" not in str(error.value)


def test_a_record_under_another_name_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, make())
    path.rename(path.with_name("mixture-9-float32.json"))
    with pytest.raises(PosteriorError, match="calibrates another posterior or predictive"):
        load(tmp_path)


def test_records_of_two_dtypes_lie_apart(tmp_path: Path) -> None:
    other = KEY.model_copy(update={"dtype": "bfloat16"})
    paths = [save(tmp_path, make(key=key)) for key in (KEY, other)]
    assert [path.name for path in paths] == ["mixture-8-float32.json", "mixture-8-bfloat16.json"]
    assert set(load(tmp_path)) == {KEY, other}


def test_a_record_of_format_1_has_its_dtype_in_the_key(tmp_path: Path) -> None:
    """As it was written then: the dtype beside the key, and not in the file's name. A newer one takes its place."""
    earlier = make()
    content = earlier.model_dump(mode="json")
    content |= {"format": 1, "dtype": content["key"].pop("dtype")}
    (tmp_path / "calibration").mkdir()
    path = tmp_path / "calibration" / "mixture-8.json"
    path.write_text(json.dumps(content | {"hash": records._digest(content)}))
    assert load(tmp_path) == {KEY: earlier}
    newer = make(method="platt")
    save(tmp_path, newer)
    assert load(tmp_path) == {KEY: newer}
    path.rename(path.with_name("mixture-9.json"))
    with pytest.raises(PosteriorError, match="calibrates another posterior or predictive"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "own"),
    [("mixture-8-float32.json", True), ("map-1.json", True), ("linearized-1024-3-bfloat16.json", True),
     (".mixture-8.json.posterior-part", True), (".mixture-8.json.posterior-lock", True),
     ("notes.json", False), ("mixture.json", False), ("mixture-8-float32.json.bak", False), ("map-1.txt", False)],
)  # fmt: skip
def test_which_files_are_records(name: str, own: bool) -> None:
    assert records.is_record(Path("calibration") / name) == own
    assert not records.is_record(Path(name)) and not records.is_record(Path("calibration") / "more" / name)


def forge(path: Path, **changes: Any) -> None:
    """Change a record and give it the hash that belongs to it, so that only the schema can notice."""
    content = json.loads(path.read_text()) | changes
    content.pop("hash")
    path.write_text(json.dumps(content | {"hash": records._digest(content)}))


def test_a_changed_number_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, make())
    content = json.loads(path.read_text())
    content["calibrator"]["temperature"] += 0.1
    path.write_text(json.dumps(content))
    with pytest.raises(PosteriorError, match="is not what `posterior calibrate` wrote"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibrator": {"method": "temperature", "temperature": math.nan}}, "calibrator.temperature"),
        ({"calibrator": {"method": "temperature", "temperature": -1.0}}, "calibrator.temperature"),
        ({"calibrator": {"method": "magic"}}, "calibrator"),
        ({"calibrator": {"method": "vector", "scale": [1.0], "bias": [0.0, 0.0]}}, "different lengths"),
        ({"calibrator": {"method": "vector", "scale": [1.0], "bias": [0.0]}}, "calibrates 1 answers"),
        ({"calibrator": {"method": "isotonic", "confidence": [0.5, 0.4], "probability": [0.1, 0.2]}}, "ascending"),
        ({"calibrator": {"method": "isotonic", "confidence": [0.5], "probability": [1.5]}}, "probability.0"),
        ({"conformal": {"score": "lac", "scores": [0.2, 0.1] * 40}}, "ascending"),
        ({"conformal": {"score": "lac", "scores": [0.2]}}, "do not belong to 80 rows"),
        ({"conformal": {"score": "lac", "scores": [0.2] * 5000}}, "conformal.scores"),
        ({"n": 58}, "n: "),
        ({"n": "80"}, "n: "),
        ({"format": 3}, "format"),
        ({"more": 1}, "more"),
        ({"before": {"nll": {"value": math.inf, "low": 0.0, "high": 1.0}}}, "before.nll.value"),
    ],
)
def test_tampering_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = save(tmp_path, make())
    forge(path, **changes)
    with pytest.raises(PosteriorError, match=words) as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b""])
def test_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, make()).write_bytes(content)
    with pytest.raises(PosteriorError, match="no readable JSON record"):
        load(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "f", make())
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PosteriorError, match="outside the folder"):
        load(tmp_path / "f")


def test_a_full_disk_leaves_the_old_record_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, make())
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(PosteriorError, match="No space left on device; make room"):
        save(tmp_path, make(method="platt"))
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]
