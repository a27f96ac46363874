"""A posterior of decisions, from rows to predictions, through the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import posterior
from posterior.calibration.scalers import Temperature
from posterior.data.decisions import TEMPLATE

CHOICE = {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "b"}, {"value": "c"}]}
PREDICATE = {"type": "predicate", "instructions": "It is good."}
ROWS: list[dict[str, Any]] = [
    row
    for i in range(8)
    for row in (
        {"input": f"x{i}", "question": CHOICE, "answer": "abc"[i % 3]},
        {"input": f"x{i}", "question": PREDICATE, "answer": i % 2 == 0},
    )
]


@pytest.fixture(scope="module")
def fitted(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> posterior.Posterior:
    return posterior.fit(
        ROWS,
        task=posterior.Task("decision", TEMPLATE),
        method=posterior.Laplace(epochs=1, rank=2, targets=("q_proj",), curvature_rank=4),
        base=str(tiny_base),
        out=tmp_path_factory.mktemp("decisions") / "tickets",
        device="cpu",
    )


def test_one_posterior_answers_questions_of_its_rows_and_others(fitted: posterior.Posterior) -> None:
    other = {"type": "score", "instructions": "How bad?", "levels": [{"label": str(i)} for i in range(5)]}
    inputs = [{"input": "y", "question": question} for question in (CHOICE, PREDICATE, other)]
    for predictive in ("linearized", "mixture", "map"):
        answers = fitted.predict(inputs, predictive=predictive)
        assert [each.answers for each in answers] == [("a", "b", "c"), ("yes", "no"), ("0", "1", "2", "3", "4")]
        assert all(each.probability.sum().item() == pytest.approx(1) for each in answers)
        assert [len(each.probability) for each in answers] == [3, 2, 5], "its own options and no others"


def test_rows_of_all_kinds_are_evaluated_together(fitted: posterior.Posterior) -> None:
    report = fitted.evaluate(ROWS)
    alone = [fitted.evaluate([row for row in ROWS if row["question"] is kind]) for kind in (CHOICE, PREDICATE)]
    for method, estimates in report.table.items():
        nll = [each.table[method]["nll"].value for each in alone]
        assert estimates["nll"].value == pytest.approx(sum(nll) / 2, abs=1e-5), method


def test_what_is_asked_is_loaded_again(fitted: posterior.Posterior) -> None:
    assert posterior.load(fitted.path).task == fitted.task


SCORE = {"type": "score", "instructions": "How bad?", "levels": [{"label": "low"}, {"label": "high"}]}


def held(kind: dict[str, Any], answers: list[Any], count: int) -> list[dict[str, Any]]:
    return [{"input": f"h{i}", "question": kind, "answer": answers[i * i % 7 % len(answers)]} for i in range(count)]


def test_each_kind_of_question_has_its_calibration_or_shares_one(fitted: posterior.Posterior) -> None:
    """Choices and predicates have enough rows, scores do not: they share that of all rows."""
    rows = held(CHOICE, ["a", "b", "c"], 70) + held(PREDICATE, [True, False], 60) + held(SCORE, ["low", "high"], 9)
    settings = posterior.Calibration(method="platt", predictive="map", dtype="float32")
    records = fitted.calibrate(rows, settings)
    assert [(each.key.question, each.n) for each in records] == [("choice", 70), ("predicate", 60), ("any", 139)]
    inputs = [{"input": "y", "question": question} for question in (CHOICE, PREDICATE, SCORE)]
    answers = fitted.predict(inputs, predictive="map")
    used = [each.calibration.key.question for each in answers if each.calibration]
    assert used == ["choice", "predicate", "any"]
    loaded = posterior.load(fitted.path, base=fitted._base_spec)
    assert [each.confidence for each in loaded.predict(inputs, predictive="map")] == [a.confidence for a in answers]


def test_one_temperature_serves_questions_of_different_numbers_of_options(fitted: posterior.Posterior) -> None:
    three = {"type": "score", "instructions": "How bad?", "levels": [{"label": str(i)} for i in range(3)]}
    inputs = [{"input": "z", "question": question} for question in (SCORE, three)]
    rows = held(CHOICE, ["a", "b", "c"], 30) + held(PREDICATE, [True, False], 30)
    settings = posterior.Calibration(predictive="map", method="temperature", dtype="float32")
    (record,) = fitted.calibrate(rows, settings)
    assert record.key.question == "any" and isinstance(record.calibrator, Temperature)
    for answer in fitted.predict(inputs, predictive="map"):
        assert answer.calibration == record
        scaled = (answer.predictive.probability.log() / record.calibrator.temperature).softmax(-1)
        assert answer.probability.tolist() == pytest.approx(scaled.tolist())


def test_isotonic_of_all_kinds_keeps_what_is_no_option_out(fitted: posterior.Posterior) -> None:
    rows = held(CHOICE, ["a", "b", "c"], 30) + held(PREDICATE, [True, False], 30)
    (record,) = fitted.calibrate(rows, posterior.Calibration(method="isotonic", predictive="map", coverage=0.99))
    assert record.key.question == "any" and record.sets["size"].value <= 2.5
