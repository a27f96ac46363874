"""A posterior of decisions, from rows to predictions, through the library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import posterior
from posterior.data.decisions import TEMPLATE
from posterior.errors import PosteriorError

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


def test_rows_of_all_kinds_are_evaluated_together(fitted: posterior.Posterior) -> None:
    report = fitted.evaluate(ROWS)
    alone = [fitted.evaluate([row for row in ROWS if row["question"] is kind]) for kind in (CHOICE, PREDICATE)]
    for method, estimates in report.table.items():
        nll = [each.table[method]["nll"].value for each in alone]
        assert estimates["nll"].value == pytest.approx(sum(nll) / 2, abs=1e-5), method


def test_what_is_asked_is_loaded_again(fitted: posterior.Posterior) -> None:
    assert posterior.load(fitted.path).task == fitted.task


def test_calibration_of_decisions_is_refused(fitted: posterior.Posterior) -> None:
    with pytest.raises(PosteriorError, match="decisions are not calibrated yet"):
        fitted.calibrate(40 * ROWS)
