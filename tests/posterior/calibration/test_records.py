"""What a record reports, and its file against damage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.model_selection import KFold

from posterior.calibration import metrics, records, scalers, signed
from posterior.calibration.conformal import Conformal, prediction_set
from posterior.calibration.measure import cross_fit, measure
from posterior.calibration.records import Key, Record
from posterior.calibration.scalers import CALIBRATORS, Isotonic
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.files import atomic
from tests.posterior.calibration.made import KEY, TASK, draw, make, ragged


def test_what_is_reported_is_cross_fitted() -> None:
    """Labels without any relation to p: seen rows look calibrated by isotonic regression, unseen ones less so."""
    p, _ = draw(150)
    y = torch.randint(3, (150,), generator=torch.Generator().manual_seed(5))
    after, sets = cross_fit(p, y, method="isotonic", score="lac", coverage=0.9)
    seen = Isotonic.fit(p, y).apply(p)
    assert metrics.nll(after, y) > metrics.nll(seen, y)
    assert sets.shape == p.shape and float(sets.gather(1, y[:, None]).double().mean()) > 0.8


@pytest.mark.parametrize("method", ["none", "temperature", "platt", "isotonic"])
def test_rows_of_different_widths_are_judged_with_their_own_options(method: scalers.Method) -> None:
    """As they are when they are served: each fold's rows one by one."""
    p, y, widths = ragged(120)
    after, sets = cross_fit(p, y, method=method, coverage=0.8, widths=widths)
    for others, fold in KFold(5, shuffle=True, random_state=0).split(p):
        calibrator, scores = CALIBRATORS[method].fit(p[others], y[others]), Conformal.fit("lac", p[others], y[others])
        for row in fold:
            own, width = p[row, : widths[row]], widths[row]
            assert torch.allclose(after[row, :width], calibrator.apply(own), rtol=1e-9)
            assert sets[row, :width].tolist() == prediction_set(calibrator, scores, own, 0.8).tolist()
            assert not after[row, width:].any() and not sets[row, width:].any()
    options: dict[str, Any] = {"score": "lac", "coverage": 0.9, "key": KEY, "data": "sha256:22", "widths": widths}
    assert measure(p, y, method=method, **options).calibrator.method == method
    with pytest.raises(PosteriorError, match="have 2 or 3 or 5 options, but vector learns a scale and a bias of each"):
        measure(p, y, method="vector", **options)


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
    path.write_text(json.dumps(content | {"hash": signed.digest(content)}))
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
    path.write_text(json.dumps(content | {"hash": signed.digest(content)}))


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
