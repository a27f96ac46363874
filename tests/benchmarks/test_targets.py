"""The intervals of benchmarks.calibration's targets, against the metrics on resampled rows."""

from __future__ import annotations

import re
import statistics

import pytest
import torch
from torch import Tensor

from benchmarks.calibration import _intervals, by_row, unseen, values
from benchmarks.cells import Result
from posterior.calibration.metrics import accuracy, nll, signed_gap
from posterior.evaluation.predictions import point

ROWS, TEST, DRAWS = 300, 200, 2000  # test rows and calibration rows


@pytest.fixture(scope="module")
def fits() -> list[list[Result]]:
    """Of ours, MAP and MAP with a temperature, at each seed, on the same rows."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    parts = {"test": slice(TEST), "calibration": slice(TEST, None)}

    def fit(sharpness: float) -> Result:
        noise = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
        logs = (sharpness * (logits + noise / 2)).log_softmax(1)
        found = {part: {"MAP": point(logs[rows])} for part, rows in parts.items()}
        return Result(
            {part: labels[rows] for part, rows in parts.items()}, found, {"MAP": 1.0, "fit": 1.0, "epoch": 1.0}
        )

    return [[fit(ours), fit(2.0), fit(0.8)] for ours in (0.2, 1.0)]  # one not sure enough, one too sure


def test_rows_average_to_the_metrics(fits: list[list[Result]]) -> None:
    result = fits[0][0]
    p, y = result.predictions["test"]["MAP"].probability, result.labels["test"]
    assert by_row(result, "MAP").mean(0).tolist() == pytest.approx((nll(p, y), accuracy(p, y)), abs=1e-9)


def test_the_gap_is_of_all_rows_that_nothing_was_fitted_to(fits: list[list[Result]]) -> None:
    result = fits[0][0]
    p, y = everything(result)
    assert float(unseen(result, "MAP").mean()) == pytest.approx(signed_gap(p, y), abs=1e-9)
    calibrated = unseen(result, "MAP+temperature")
    assert len(calibrated) == TEST
    row = values(result, "MAP+temperature")
    assert (row["gap unseen"], row["gap"]) == pytest.approx((float(calibrated.mean()),) * 2, abs=1e-9)
    row = values(result, "MAP")
    assert row["gap"] == pytest.approx(signed_gap(p[:TEST], y[:TEST]), abs=1e-9)
    assert row["gap unseen"] != pytest.approx(row["gap"], abs=1e-3)


def everything(result: Result) -> tuple[Tensor, Tensor]:
    """Probabilities and labels of the test rows, then of the calibration rows."""
    p = torch.cat([result.predictions[part]["MAP"].probability for part in ("test", "calibration")])
    return p, torch.cat([result.labels[part] for part in ("test", "calibration")])


def test_intervals_are_those_of_resampled_metrics(fits: list[list[Result]]) -> None:
    generator, drawn = torch.Generator().manual_seed(1), []
    for _ in range(DRAWS):
        pick = torch.randint(TEST, (TEST,), generator=generator)
        y = fits[0][0].labels["test"][pick]
        p = [[result.predictions["test"]["MAP"].probability[pick] for result in seed] for seed in fits]
        ratio = sum(nll(ours, y) for ours, _, _ in p) / sum(nll(scaled, y) for _, _, scaled in p)
        points = statistics.fmean(100 * (accuracy(ours, y) - accuracy(plain, y)) for ours, plain, _ in p)
        pick = torch.randint(ROWS, (ROWS,), generator=generator)
        whole = [everything(seed[0]) for seed in fits]
        gap = statistics.fmean(abs(signed_gap(q[pick], y[pick])) for q, y in whole)
        drawn.append((ratio, gap, points))
    numbers = torch.tensor(drawn, dtype=torch.float64)
    expected = numbers.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T
    rows, gaps = ({"set": [[of(result, "MAP") for result in seed] for seed in fits]} for of in (by_row, unseen))
    found = _intervals(rows, gaps, DRAWS)
    for name, limits, spread in zip(("nll", "gap", "points"), expected, numbers.std(0), strict=True):
        low, high = (float(number) for number in re.findall(r"[-+]?[\d.]+", found[name]))
        # 2,000 draws know a 2.5 % quantile to .06 standard deviations; four of them from each side, and the rounding
        assert (low, high) == pytest.approx(
            tuple(limits.tolist()), abs=0.34 * float(spread) + 0.05 * (name == "points")
        )
