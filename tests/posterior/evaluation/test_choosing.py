"""Predictives compared by cross-fitted NLL: losses by hand, the rule of one standard error, the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from posterior.calibration import choice
from posterior.calibration.choice import Choice, Compared
from posterior.calibration.measure import cross_fit
from posterior.calibration.metrics import Estimate
from posterior.calibration.records import QuestionKind
from posterior.errors import PosteriorError
from posterior.evaluation.choosing import Predicted, compare

N = 200
TOO_SURE = 4.0


@pytest.fixture
def y() -> torch.Tensor:
    return torch.randint(3, (N,), generator=torch.Generator().manual_seed(0))


def predicted(y: torch.Tensor, sure: float = 1.0, evaluations: int = 1) -> Predicted:
    """Scores that know something of the answer, and are `sure` times as sure as they should be."""
    noise = torch.randn(N, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = noise + torch.nn.functional.one_hot(y, 3)
    return Predicted((sure * scores).softmax(1), evaluations, "float32")


def test_losses_are_of_calibrations_that_did_not_see_the_row(y: torch.Tensor) -> None:
    one = predicted(y, TOO_SURE)
    plain, scaled = compare({"map": one}, y, {None: range(N)}, [3] * N, ("none", "temperature"))
    after, _ = cross_fit(one.probability, y, method="temperature")
    by_hand = -after.gather(1, y[:, None])[:, 0].log()
    raw = -one.probability.gather(1, y[:, None])[:, 0].log()
    assert (plain.nll.value, scaled.nll.value) == pytest.approx((float(raw.mean()), float(by_hand.mean())))
    assert (scaled.excess, scaled.error) == (0, 0) and scaled.close and not plain.close
    assert plain.excess == pytest.approx(float((raw - by_hand).mean()))
    assert plain.error == pytest.approx(float((raw - by_hand).std()) / math.sqrt(N))


def test_the_cheapest_of_equals_wins(y: torch.Tensor) -> None:
    """The mixture is as good as the cheaper linearised predictive; the MAP is the cheapest, and too sure."""
    alike = predicted(y)
    found = compare(
        {"mixture": alike._replace(evaluations=8), "linearized": alike._replace(evaluations=3),
         "map": predicted(y, TOO_SURE)},
        y, {None: range(N)}, [3] * N, ("none",),
    )  # fmt: skip
    made = Choice.of(found, posterior="h", n=N, data="d")
    assert (made.predictive, made.method) == ("linearized", "none")
    calibrated = compare({"linearized": alike, "map": predicted(y, TOO_SURE)}, y, {None: range(N)}, [3] * N,
                         ("none", "temperature"))  # fmt: skip
    alone = Choice.of(
        tuple(each.model_copy(update={"evaluations": 1 + (each.predictive != "map")}) for each in calibrated),
        posterior="h", n=N, data="d",
    )  # fmt: skip
    assert (alone.predictive, alone.method) == ("map", "temperature"), "a temperature is all that it needs"


def test_a_kind_of_question_has_its_own_calibration(y: torch.Tensor) -> None:
    """Rows of "any" are all; those of a kind with a calibration of its own do not use it."""
    p = predicted(y, TOO_SURE)
    mixed = p.probability.clone()
    mixed[: N // 2] = predicted(y, 1.0).probability[: N // 2]
    kinds: dict[QuestionKind | None, range] = {"choice": range(N // 2), "any": range(N)}
    (found,) = compare({"map": p._replace(probability=mixed)}, y, kinds, [3] * N, ("platt",))
    loss = torch.empty(N, dtype=torch.float64)
    for part in (range(N), range(N // 2)):
        after, _ = cross_fit(mixed[list(part)], y[list(part)], method="platt")
        loss[list(part)] = -after.gather(1, y[list(part), None])[:, 0].log()
    assert found.nll.value == pytest.approx(float(loss.mean()))


def test_methods_that_rows_do_not_allow_are_left_out(y: torch.Tensor) -> None:
    right = Predicted(torch.nn.functional.one_hot(y, 3).double() * 0.7 + 0.1, 1, "float32")
    found = compare({"map": right}, y, {None: range(N)}, [3] * N, ("temperature", "platt"))
    assert [each.method for each in found] == ["platt"]
    with pytest.raises(PosteriorError, match="all 200 answers are right"):
        compare({"map": right}, y, {None: range(N)}, [3] * N, ("temperature",))
    with pytest.raises(PosteriorError, match="not finite"):
        compare(
            {"map": right._replace(probability=right.probability * math.nan)}, y, {None: range(N)}, [3] * N, ("none",)
        )


def made() -> Choice:
    one = Compared(predictive="map", method="none", nll=Estimate(0.5, 0.4, 0.6), excess=0, error=0, evaluations=1)
    return Choice.of((one,), posterior="sha256:1", n=60, data="sha256:2")


def test_the_file_round_trips(tmp_path: Path) -> None:
    (tmp_path / "calibration").mkdir()
    assert choice.load(tmp_path, posterior="sha256:1", predictives=("map",)) is None
    choice.save(tmp_path, made())
    assert choice.load(tmp_path, posterior="sha256:1", predictives=("mixture", "map")) == made()


@pytest.mark.parametrize("change", [{"posterior": "sha256:3"}, {"predictive": "linearized"}])
def test_a_choice_of_another_posterior_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    (tmp_path / "calibration").mkdir()
    path = choice.save(tmp_path, made())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PosteriorError, match="served.json chooses for another posterior; delete it, or run"):
        choice.load(tmp_path, posterior="sha256:1", predictives=("mixture", "map"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2}'])
def test_a_damaged_choice_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "served.json").write_text(text)
    with pytest.raises(PosteriorError, match="served.json is not what `posterior calibrate` wrote; delete it") as error:
        choice.load(tmp_path, posterior="sha256:1", predictives=("map",))
    assert "\n" not in str(error.value)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own" / "calibration").mkdir(parents=True)
    (tmp_path / "calibration").mkdir()
    elsewhere = choice.save(tmp_path, made())
    (tmp_path / "own" / "calibration" / "served.json").symlink_to(elsewhere)
    with pytest.raises(PosteriorError, match="leads outside the folder; refused"):
        choice.load(tmp_path / "own", posterior="sha256:1", predictives=("map",))
