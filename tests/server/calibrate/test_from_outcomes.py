"""`posterior calibrate --from-outcomes`: the records that outcomes make, what is refused, and how a server takes them
up."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posterior.calibration import metrics
from posterior.calibration.conformal import Conformal
from posterior.calibration.records import Key, Record, template_hash
from posterior.calibration.rightness import PLAIN, TextKey, TextRecord
from posterior.calibration.risk import Risk
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.models.base import resolve
from posterior.storage import artefact
from posterior.storage.artefact import Posterior
from server.calibrate.outcomes import OutcomeCalibration, made, read
from server.cli import main
from server.engine import Adapter
from server.metrics import Metrics
from server.services import renewing
from server.services.registry import Registry, Served
from server.store.reading import Stored
from server.store.store import DAY, Store
from server.store.values import Answer, Reply, Report, Reporter
from tests.server import fakes, folders

SETTINGS = OutcomeCalibration(method="temperature")
TEXT = TextKey(
    base=fakes.BASE.hash, posterior="h", predictive="mixture", particles=3, dtype="bfloat16", text="greedy"
)  # fmt: skip


def key(posterior: Posterior, **changes: Any) -> Key:
    own = {"base": posterior.base["hash"], "posterior": posterior.hash, "template": template_hash(posterior.task)}
    return Key(**{**own, "predictive": "mixture", "particles": 3, "dtype": "bfloat16", **changes})


def rows(key: Key | TextKey, n: int, *, came: int | None = None, wrong: float = 0.2, seed: int = 0) -> list[Stored]:
    """n answers to a choice between two, or texts, of which the first `came` have an outcome."""
    draw = random.Random(seed)
    found = []
    for number in range(n):
        p, right = 0.5 + 0.5 * draw.random(), draw.random() >= wrong
        outcome = (1.0, right, int(right)) if came is None or number < came else (None, None, None)
        text = isinstance(key, TextKey)
        features = {name: draw.random() - (name == "mean_logprob") for name in PLAIN} if text else None
        found.append(
            Stored(
                "o", f"r{number}", 0, float(number), "text" if text else "answers", "mixture", key.model_dump(), None,
                None if text else (1 - p, p), 1, p, None, None, None, 0.5, None, None, features, True, *outcome,
            )
        )  # fmt: skip
    return found


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about the intervals of a record."""
    monkeypatch.setattr(metrics, "RESAMPLES", 2)


@pytest.fixture(scope="module")
def base() -> Any:
    return resolve()


@pytest.fixture
def gang(base: Any, tmp_path: Path) -> Posterior:
    return folders.particles(tmp_path, base)


@pytest.fixture
def posterior() -> Any:
    found: Any = fakes.Posterior("gang", "particles")
    found.base = {"hash": fakes.BASE.hash}
    return found


def test_a_record_of_outcomes_is_that_of_rows(posterior: Any) -> None:
    own = key(posterior)
    given = rows(own, 100)
    (record,) = made(posterior, given, SETTINGS, "choice").choices
    p = torch.tensor([row.probability for row in given], dtype=torch.float64)
    y = torch.tensor([row.truth for row in given])
    assert (record.key, record.n, record.calibrator.method) == (own, 100, "temperature")
    assert record.risk == Risk.fit(p, y) and record.conformal == Conformal.fit("lac", p, y)
    assert record.collected is not None and abs(record.collected.until - time.time()) < 60
    assert (record.collected.requested, record.collected.missing, record.collected.confidence_only) == (100, 0, False)
    assert record.reference is not None and sum(record.reference.confidence) == 100
    (chosen,) = made(posterior, given, OutcomeCalibration(), "choice").choices
    assert chosen.after["nll"].value <= record.after["nll"].value


def test_outcomes_that_never_came_are_the_worst_that_they_can_be(posterior: Any) -> None:
    own = key(posterior)
    given = rows(own, 200, came=170)
    found = made(posterior, given, SETTINGS, "choice")
    (record,) = found.choices
    assert record.risk is not None and record.n == 200 == len(record.risk.right) == len(record.conformal.scores)
    assert record.conformal.scores[-30:] == (1.0,) * 30
    known = sum(bool(row.correct) for row in given[:170])
    assert sum(record.risk.right) == known
    assert sorted(record.risk.confidence) == pytest.approx(sorted(max(row.probability or ()) for row in given))
    note = "30 of 200 outcomes that were asked for have not come; what is promised counts them as wrong answers"
    assert found.notes == [f"{own.file_name}: {note}"]
    worst = [row if row.correct is not None else Stored(**{**vars(row), "correct": False, "truth": 0}) for row in given]
    (as_wrong,) = made(posterior, worst, SETTINGS, "choice").choices
    assert record.risk == as_wrong.risk


def test_what_is_promised_holds_whatever_keeps_outcomes_away(posterior: Any) -> None:
    """Wrong answers are reported half as often; the share that is wrong above the threshold stays below what is
    allowed, in 9 of 10 calibrations at least."""
    broken, own, answered = 0, key(posterior), 0
    for seed in range(20):
        draw = random.Random(1000 + seed)
        every = [
            Stored(**{**vars(row), "correct": (good := draw.random() < c), "truth": int(good)})
            for row, c in ((row, max(row.probability or ())) for row in rows(own, 400, seed=seed))
        ]
        silent = {"reported": None, "correct": None, "truth": None}
        heard = [Stored(**{**vars(row), **silent}) if not row.correct and draw.random() < 0.5 else row for row in every]
        (record,) = made(posterior, heard, SETTINGS, "choice").choices
        assert record.risk is not None
        threshold = record.risk.threshold(0.2)
        if threshold is not None:  # confidence c is right with probability c: above t the error is (1 - t) / 2
            answered += 1
            broken += (1 - threshold) / 2 > 0.2
    assert answered >= 5 and broken <= 2


def test_decisions_have_a_record_of_each_kind_that_has_enough(posterior: Any) -> None:
    posterior.task = Task("decision", "{input}\n{question}", None)
    parts = [("choice", 60), ("score", 40), ("predicate", 30)]
    given = [row for kind, n in parts for row in rows(key(posterior, question=kind), n)]
    found = made(posterior, given, SETTINGS, "choice")
    assert {record.key.question: record.n for record in found.choices} == {"choice": 60, "any": 130}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "has asked for no outcome of this posterior's answers, and outcomes come mostly of answers that somebody"),
        (58, "58 outcomes are too few, it takes 59. Only outcomes that the server asked for count: .* --label-share"),
    ],
)
def test_without_enough_labels_that_chance_chose_nothing_is_promised(posterior: Any, given: int, message: str) -> None:
    with pytest.raises(PosteriorError, match=message) as error:
        made(posterior, rows(key(posterior), given), SETTINGS, "choice")
    assert "--confidence-only" in str(error.value)


def test_outcomes_that_do_not_say_what_was_true_are_refused(posterior: Any) -> None:
    given = [Stored(**{**vars(row), "truth": row.truth if row.correct else None}) for row in rows(key(posterior), 80)]
    with pytest.raises(PosteriorError, match="outcomes say that the answer was wrong and not what was true"):
        made(posterior, given, SETTINGS, "choice")


def test_confidence_alone_leaves_what_is_promised(posterior: Any) -> None:
    own = key(posterior)
    (old,) = made(posterior, rows(own, 80, seed=1), SETTINGS, "choice").choices
    alone = OutcomeCalibration(method="platt", confidence_only=True)
    with pytest.raises(PosteriorError, match="there is no record mixture-3-bfloat16.json whose promises could stay"):
        made(posterior, rows(own, 90), alone, "choice")
    posterior.calibration = {own: old}
    (new,) = made(posterior, rows(own, 90), alone, "choice").choices
    assert (new.risk, new.conformal, new.n, new.reference) == (old.risk, old.conformal, old.n, old.reference)
    assert new.calibrator.method == "platt" and new.data != old.data
    assert old.collected is not None
    assert new.collected == old.collected.model_copy(update={"confidence_only": True})


def test_texts_are_graded_by_their_outcomes(posterior: Any) -> None:
    given = rows(TEXT, 120, came=100)
    (record,) = made(posterior, given, OutcomeCalibration(), "text").texts
    assert (record.key, record.n, record.grading, record.max_tokens) == (TEXT, 120, "outcomes", None)
    assert len(record.risk.right) == 50 + 20, "half of those that came, and all that did not"
    assert record.guard is not None
    table = record.guard.table([row.features for row in given[100:] if row.features is not None])
    assert set(record.guard(table).tolist()) <= set(record.risk.confidence)
    posterior.texts = {TEXT: record}
    (new,) = made(posterior, rows(TEXT, 80, seed=2), OutcomeCalibration(confidence_only=True), "text").texts
    assert (new.risk, new.guard, new.strange, new.n) == (record.risk, record.guard, record.strange, 120)
    assert new.model != record.model
    assert made_nothing(posterior, given)


def made_nothing(posterior: Any, given: Sequence[Stored]) -> bool:
    """Whether texts make no record of choices."""
    with pytest.raises(PosteriorError, match="asked for no outcome"):
        made(posterior, given, SETTINGS, "choice")
    return True


@pytest.fixture
def stored(gang: Posterior, tmp_path: Path) -> Iterator[Path]:
    """A file of 70 outcomes that were asked for, 10 that were not, and 5 that never came; 5 of the first are old."""
    file = tmp_path / "outcomes.db"
    store, own = Store(f"sqlite:///{file}", Metrics()), key(gang)
    for number, row in enumerate(rows(own, 85)):
        answer = Answer(
            "answers", "mixture", 3, "bfloat16", own.model_dump(), (" negative", " positive"),
            tuple(row.probability or ()), 1, row.confidence, requested=not 70 <= number < 80,
        )  # fmt: skip
        created = time.time() - (9 * DAY if number < 5 else 0)
        store.keep(Reply("o", row.id, created, "gang", "gang", gang.hash, gang.base["hash"], {0: answer}))
        if number < 80:
            (done,) = asyncio.run(store.report(Reporter("o"), [Report(row.id, correct=row.correct)]))
            assert done.status == "stored"
    store.close()
    yield file


def serving(posterior: Posterior) -> Any:
    """A service of the posterior, as far as its calibrations go."""
    adapter = Adapter("gang/000", posterior.path / "particles/000", 1)
    return SimpleNamespace(registry=Registry(resolve(), {"gang": Served("gang", posterior, particles=(adapter,))}))


def test_the_command_writes_a_record_and_the_server_takes_it_up(
    gang: Posterior, stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = serving(gang)
    watcher = renewing.Watcher(service, renewing.looks(service.registry))
    assert watcher.changed() == {}
    assert main(["calibrate", str(gang.path), "--from-outcomes", str(stored), "--json"]) == 0
    said = capsys.readouterr()
    (record,) = artefact.load(gang.path).calibration.values()
    assert (
        json.loads(said.out)["data"] == record.data and "5 of 75 outcomes that were asked for have not come" in said.err
    )
    assert (record.n, record.key) == (75, key(gang))
    assert watcher.changed() == {}, "the files must have stayed the same for a while"
    fresh = watcher.changed()
    assert list(fresh) == [gang.hash] and fresh[gang.hash].calibration == {record.key: record}
    assert watcher.changed() == {} and "the calibration of gang was read again: 1 record" in capsys.readouterr().err


def test_a_record_that_cannot_be_read_is_not_taken_up(gang: Posterior, capsys: pytest.CaptureFixture[str]) -> None:
    service = serving(gang)
    watcher = renewing.Watcher(service, renewing.looks(service.registry))
    (gang.path / "calibration").mkdir()
    (gang.path / "calibration" / "mixture-3-bfloat16.json").write_text("{}")
    assert [watcher.changed() for _ in range(3)] == [{}] * 3
    assert capsys.readouterr().err.count("warning: gang keeps the calibration that it had: ") == 1


def test_the_watch_passes_on_what_is_new(gang: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewing, "EVERY_SECONDS", 0.01)
    service = serving(gang)
    (record,) = made(gang, rows(key(gang), 80), SETTINGS, "choice").choices

    async def watched() -> Mapping[str, Posterior]:
        taken: asyncio.Queue[Mapping[str, Posterior]] = asyncio.Queue()
        watching = asyncio.create_task(renewing.watch(service, renewing.looks(service.registry), taken.put))
        await asyncio.to_thread(gang.add, record)
        async with asyncio.timeout(10):
            found = await taken.get()
        watching.cancel()
        return found

    assert asyncio.run(watched())[gang.hash].calibration == {record.key: record}


def test_days_leave_out_what_is_older(gang: Posterior, stored: Path) -> None:
    assert len(read(str(stored), gang, OutcomeCalibration())) == 75
    assert len(read(f"sqlite:///{stored}", gang, OutcomeCalibration(days=2))) == 70
    assert len(read(str(stored), gang, OutcomeCalibration(confidence_only=True))) == 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rows.jsonl", "--from-outcomes", "FILE"], "made of rows or of outcomes; give a file, or --from-outcomes"),
        (["--from-outcomes", "nowhere.db"], "there is no file nowhere.db of outcomes"),
        (["--from-outcomes", "mysql://u:secret@h/d"], "outcomes cannot be kept in mysql://u:"),
        (["--from-outcomes", "FILE", "--dtype", "float32"], "--dtype belongs to"),
        (["--from-outcomes", "FILE", "--coverage", "1"], "--coverage is 1.0; it must lie between 0 and 1"),
        (["--from-outcomes", "FILE", "--days", "0"], "--days is 0.0; it must be"),
        ([], "the held-out rows are missing"),
        (["--task", "text"], "the graded rows are missing"),
        (["rows.jsonl", "--days", "2"], "--days belongs to"),
    ],
)
def test_what_the_command_refuses(
    gang: Posterior, stored: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(stored) if word == "FILE" else word for word in words]
    assert main(["calibrate", str(gang.path), *given]) == 2
    said = capsys.readouterr().err
    assert message in said and "secret" not in said


def test_records_of_earlier_versions_are_still_read(gang: Posterior) -> None:
    (record,) = made(gang, rows(key(gang), 80), SETTINGS, "choice").choices
    content = record.model_dump(mode="json")
    del content["reference"], content["collected"]
    earlier = Record.model_validate_json(json.dumps(content))
    assert earlier.reference is None and earlier.collected is None and earlier.risk == record.risk
    assert TextRecord.model_fields["reference"].default is None
