"""`posterior calibrate` on a tiny posterior: what it writes, that the posterior stays the same one, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from posterior.calibration import conformal, scalers
from posterior.calibration.metrics import METRICS
from posterior.calibration.records import Record
from posterior.cli import calibrate, fit, inspect
from posterior.data.examples import data_hash, encode
from posterior.errors import PosteriorError
from posterior.evaluation.calibrate import probabilities, served_dtype
from posterior.evaluation.predictions import linearized, map_scores, sampled
from posterior.likelihood.states import last_states
from posterior.models import lora
from posterior.models.base import Base, load_model, load_tokenizer, resolve
from posterior.storage import artefact
from tests.posterior.evaluation.made import arguments, write
from tests.sealed import edit

ROWS = 60
WORDS = ("good", "fine", "poor", "bad")


def row(index: int) -> dict[str, Any]:
    return {"text": f"{WORDS[index % 4]} thing {index}", "label": int(index % 4 > 1) ^ (index % 7 == 0)}


@pytest.fixture(scope="module")
def fitted(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A posterior folder and, beside it, the rows it was fitted on: 60 of them."""
    folder = tmp_path_factory.mktemp("fitted")
    data = write(folder / "train.jsonl", [row(index) for index in range(1000, 1000 + ROWS)])
    options = ["--out", folder / "tiny", "--template", "{text}:", "--answers", "p", "n", "--base", tiny_base]
    fit.call(arguments(fit, data, *options, "--rank", 2, "--epochs", 1))
    shutil.rmtree(folder / "tiny" / "calibration")  # the probes
    return folder


@pytest.fixture
def folder(fitted: Path, tmp_path: Path) -> Path:
    shutil.copytree(fitted / "tiny", tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "held-out.jsonl", [row(index) for index in range(ROWS)])


@pytest.fixture
def call(tiny_base: Path) -> Any:
    def call(folder: Path, data: Path, *options: Any) -> list[tuple[Record, Path]]:
        return calibrate.call(arguments(calibrate, folder, data, "--base", tiny_base, *options)).records

    return call


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--predictive", "linearized"), "linearized-1024-float32"),
        (("--predictive", "mixture", "--particles", 3, "--dtype", "float32"), "mixture-3-float32"),
        (("--predictive", "map", "--dtype", "float32"), "map-1-float32"),
    ],
)
def test_it_calibrates_the_predictive_the_server_gives(
    folder: Path, data: Path, call: Any, tiny_base: Path, options: tuple[Any, ...], name: str
) -> None:
    ((record, path),) = call(folder, data, "--method", "platt", *options)
    assert path == folder / "calibration" / f"{name}.json"
    posterior, base = artefact.load(folder), resolve(str(tiny_base))
    rows = [row(index) for index in range(ROWS)]
    assert posterior.calibration == {record.key: record}
    assert (record.n, record.data, record.key.dtype) == (ROWS, data_hash(rows), "float32")
    assert (record.key.base, record.key.posterior) == (base.hash, posterior.hash)
    tokenizer: Any = load_tokenizer(base)
    examples = encode(posterior.task, tokenizer, rows)
    model = lora.load_peft(load_model(base, torch.float32, "cpu"), posterior.map_dir).eval()
    p = {
        "linearized": lambda: linearized(model, posterior.covariance, examples).probability,
        "mixture": lambda: sampled(model, posterior, 3, examples).probability,
        "map": lambda: map_scores(model, examples).softmax(1),
    }[record.key.predictive]()
    y = torch.tensor([one["label"] for one in rows])
    assert record.calibrator == scalers.Platt.fit(p, y)
    assert record.conformal == conformal.Conformal.fit("lac", p, y)
    assert set(record.before) == set(record.after) == set(METRICS)


def test_it_keeps_what_questions_are_familiar(folder: Path, data: Path, tiny_base: Path) -> None:
    """By the states of theta*, and for a mixture by those of its first particle, in the server's dtype."""
    options = ["--base", tiny_base, "--dtype", "float32", "--particles", 3]
    found = calibrate.call(arguments(calibrate, folder, data, *options))
    names = [f"familiarity-{name}-float32.safetensors" for name in ("map", "particle")]
    assert sorted(found.familiarity) == [folder / "calibration" / name for name in names]
    posterior, base = artefact.load(folder), resolve(str(tiny_base))
    examples = encode(posterior.task, load_tokenizer(base), [row(index) for index in range(ROWS)])
    model = lora.load_peft(load_model(base, torch.float32, "cpu"), posterior.map_dir).eval()
    for adapter in ("map", "particle"):
        if adapter == "particle":
            lora.put(model, next(iter(posterior.thetas(3))))
        center = posterior.familiarity[adapter, "float32"].center
        torch.testing.assert_close(center.mean[0], last_states(model, examples).mean(0), rtol=1e-4, atol=1e-5)
    assert len(posterior.familiarity) == 2


@pytest.mark.parametrize("closed", [".", "..", "calibration"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    if closed == "calibration":
        (folder / closed).mkdir()
    place = (folder / closed).resolve()
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != place)  # for root every mode is open
    with pytest.raises(PosteriorError, match=f"you may not write into {place}; calibrate a copy"):
        call(folder, "/nowhere")


def test_the_posterior_stays_the_same_one(folder: Path, data: Path, call: Any) -> None:
    record = (folder / "posterior.json").read_bytes()
    before = artefact.load(folder)
    assert before.calibration == {}
    call(folder, data, "--predictive", "linearized")
    assert inspect.describe(artefact.load(folder))["calibration"] == "1 record"
    call(folder, data, "--predictive", "map")
    after = artefact.load(folder)
    assert (folder / "posterior.json").read_bytes() == record and after.hash == before.hash
    assert inspect.describe(after)["calibration"] == "2 records"


@pytest.mark.parametrize(
    ("own", "predictive", "device", "dtype"),
    [
        ({"dtype": "bfloat16"}, "linearized", "cpu", "float32"),
        ({"dtype": "float32"}, "linearized", "cuda", "bfloat16"),
        ({"dtype": "bfloat16"}, "mixture", "cpu", "bfloat16"),
        ({"torch_dtype": "float16"}, "map", "cpu", "float16"),
        ({"dtype": "float32"}, "map", "cpu", "bfloat16"),
        ({"text_config": {"dtype": "float16"}}, "mixture", "cuda", "float16"),
        ({}, "mixture", "cuda", "bfloat16"),
    ],
)
def test_the_dtype_is_what_the_server_computes_in(
    tmp_path: Path, own: Any, predictive: Any, device: str, dtype: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(own))
    assert served_dtype(predictive, Base(tmp_path, "tiny", None, ""), device) == dtype


def test_a_posterior_that_was_replaced_meanwhile_is_not_calibrated(
    fitted: Path, folder: Path, data: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = probabilities

    def replaced(*arguments: Any) -> torch.Tensor:
        edit(folder, width=0.5)
        return original(*arguments)

    monkeypatch.setattr("posterior.evaluation.calibrate.probabilities", replaced)
    with pytest.raises(PosteriorError, match="was replaced while its calibration was computed"):
        call(folder, data)
    assert artefact.load(folder).calibration == {}


def test_another_fit_in_the_folder_has_no_calibration(folder: Path, data: Path, call: Any) -> None:
    ((_, path),) = call(folder, data)
    edit(folder, width=0.5)
    with pytest.raises(PosteriorError, match=f"{path.name} calibrates another posterior"):
        artefact.load(folder)
    path.unlink()
    with pytest.raises(PosteriorError, match="served.json chooses for another posterior; delete it"):
        artefact.load(folder)


def test_the_table_and_json(folder: Path, data: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = ("--base", tiny_base, "--predictive", "linearized", "--method", "temperature")
    calibrate.run(arguments(calibrate, folder, data, *named, "--conformal", "aps", "--coverage", 0.8))
    text = capsys.readouterr().out
    assert "| linearized |" in text and "| linearized, temperature (cross-fitted) |" in text
    assert (
        "prediction sets (aps) at coverage 0.8, cross-fitted: covered 0." in text
        and "linearized-1024-float32.json" in text
    )
    calibrate.run(arguments(calibrate, folder, data, *named, "--json"))
    assert json.loads(capsys.readouterr().out)["calibrator"]["method"] == "temperature"


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (range(58), (), r"58 rows are too few.*0\.95\^58 = 0\.051 > 0\.05"),
        (range(ROWS), ("--predictive", "map", "--particles", 4), "belongs to --predictive mixture"),
        (range(ROWS), ("--predictive", "mixture", "--particles", 0), "at least 1"),
        (range(ROWS), ("--coverage", 1.0), "between 0 and 1"),
    ],
)
def test_refusals_come_before_any_work(
    folder: Path, tmp_path: Path, rows: range, options: tuple[Any, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posterior.evaluation.calibrate.resolve", lambda _: pytest.fail("the base was loaded"))
    data = write(tmp_path / "rows.jsonl", [row(index) for index in rows])
    with pytest.raises(PosteriorError, match=words) as error:
        calibrate.call(arguments(calibrate, folder, data, *options))
    assert "\n" not in str(error.value) and not (folder / "calibration").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: {"label": 0}, "every row has the label 'p'"),
        (lambda index: {"label": 2 if index == 6 else index % 2}, "row 7: label 2 is neither"),
        (lambda index: {"label": -1}, "row 1: label -1 is neither"),
        (lambda index: {"text": 3}, "row 1: field 'text'"),
        (
            lambda index: row(1000 + index) if index < 4 else {},
            f"4 of the {ROWS} rows are rows that 'tiny' was fitted on",
        ),
    ],
)
def test_bad_rows_are_named(folder: Path, tmp_path: Path, call: Any, change: Any, words: str) -> None:
    data = write(tmp_path / "rows.jsonl", [row(index) | change(index) for index in range(ROWS)])
    with pytest.raises(PosteriorError, match=words):
        call(folder, data)


def change_task(folder: Path, kind: str) -> None:
    """A posterior without answers of its own."""
    edit(folder, task={"kind": kind, "template": "{text}", "answers": None})


def test_texts_are_refused(folder: Path, data: Path) -> None:
    change_task(folder, "text")
    with pytest.raises(PosteriorError, match="is a text posterior"):
        calibrate.call(arguments(calibrate, folder, data))


@pytest.mark.parametrize(("predictive", "particles"), [("linearized", 1024), ("mixture", 8)])
def test_rows_with_answers_of_their_own(
    folder: Path, tmp_path: Path, call: Any, tiny_base: Path, predictive: str, particles: int
) -> None:
    change_task(folder, "choice")
    rows = [row(index) | {"choices": [f" p{index}", " n", f" q {index}"]} for index in range(ROWS)]
    data = write(tmp_path / "own.jsonl", rows)
    ((record, path),) = call(folder, data, "--method", "platt", "--predictive", predictive, "--dtype", "float32")
    assert path.name == f"{predictive}-{particles}-3-float32.json" and record.key.answers == 3
    posterior = artefact.load(folder)
    assert posterior.calibration == {record.key: record}
    base = resolve(str(tiny_base))
    tokenizer: Any = load_tokenizer(base)
    examples = encode(posterior.task, tokenizer, rows)
    model = lora.load_peft(load_model(base, torch.float32, "cpu"), posterior.map_dir).eval()
    p = probabilities(model, posterior, record.key.predictive, particles, examples)
    y = torch.tensor([one["label"] for one in rows])
    assert p.shape == (ROWS, 3) and record.calibrator == scalers.Platt.fit(p, y)
    assert record.conformal == conformal.Conformal.fit("lac", p, y)
    two = write(data, [one | {"choices": [" p", " n"]} for one in rows])
    ((_, other),) = call(folder, two, "--predictive", "linearized")
    assert other.name == "linearized-1024-2-float32.json" and len(artefact.load(folder).calibration) == 2


def test_answers_of_their_own_that_no_record_can_serve(folder: Path, tmp_path: Path, call: Any) -> None:
    change_task(folder, "choice")
    rows = [row(index) | {"choices": [" p", " n"] + [" q"] * (index % 2)} for index in range(ROWS)]
    data = write(tmp_path / "own.jsonl", rows)
    with pytest.raises(PosteriorError, match="the rows have 2 or 3 answers; give those of each number in a file"):
        call(folder, data)
    with pytest.raises(PosteriorError, match="brings its own answers, but --method vector"):
        call(folder, data, "--method", "vector")
    assert not (folder / "calibration").exists()


def test_particle_posteriors(fitted: Path, tmp_path: Path, data: Path, call: Any) -> None:
    source = artefact.load(fitted / "tiny")
    mean = lora.read_adapter(source.map_dir)
    artefact.save(
        tmp_path / "gang", family="particles", base=source.base, task=source.task, prior={}, fit={}, mean=mean,
        lora_config=lora.read_config(source.map_dir), particles=[mean, mean], weights=[0.25, 0.75],
    )  # fmt: skip
    with pytest.raises(PosteriorError, match="no linearized predictive"):
        call(tmp_path / "gang", data, "--predictive", "linearized")
    with pytest.raises(PosteriorError, match="--particles is 3; 'gang' has 2"):
        call(tmp_path / "gang", data, "--particles", 3)
    ((record, path),) = call(tmp_path / "gang", data, "--predictive", "mixture")
    assert path.name == "mixture-2-bfloat16.json" and record.key.particles == 2


def test_the_rows_choose_the_predictive_that_is_served(
    folder: Path, data: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All predictives and calibrators are compared; what wins has a record, and is the folder's default."""
    calibrate.run(arguments(calibrate, folder, data, "--base", tiny_base, "--particles", 2))
    posterior = artefact.load(folder)
    choice = posterior.choice
    assert choice is not None and choice.n == ROWS
    compared = {(each.predictive, each.method) for each in choice.compared}
    assert compared == {(p, m) for p in ("linearized", "mixture", "map") for m in scalers.CALIBRATORS}
    assert {each.evaluations for each in choice.compared} == {1, 2}
    (record,) = posterior.calibration.values()
    assert (record.key.predictive, record.calibrator.method) == (choice.predictive, choice.method)
    assert posterior.predictives[0] == choice.predictive
    text = capsys.readouterr().out
    assert text.count("\n| ") >= 15 and f"served by default: {choice.predictive}" in text
    held = calibrate.call(
        arguments(calibrate, folder, data, "--base", tiny_base, "--predictive", "mixture", "--method", "none")
    )
    assert held.choice is None and artefact.load(folder).choice == choice, "a named predictive changes no default"


def test_json_has_the_comparison_before_the_record(
    folder: Path, data: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate.run(arguments(calibrate, folder, data, "--base", tiny_base, "--particles", 2, "--json"))
    told, record = map(json.loads, capsys.readouterr().out.splitlines())
    assert told == json.loads((folder / "calibration" / "served.json").read_text())
    assert len(told["compared"]) == 3 * len(scalers.CALIBRATORS)
    assert (record["key"]["predictive"], record["calibrator"]["method"]) == (told["predictive"], told["method"])
