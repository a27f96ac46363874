"""The intervals of benchmarks.calibration's wishes, against the metrics on resampled rows."""

from __future__ import annotations

import re
import statistics

import pytest
import torch

from benchmarks.calibration import _intervals, by_row
from benchmarks.cells import Result
from posterior.evaluate import point
from posterior.metrics import accuracy, nll, signed_gap

ROWS, DRAWS = 200, 2000


@pytest.fixture(scope="module")
def fits() -> list[list[Result]]:
    """Of ours, MAP and MAP with a temperature, at each seed, on the same test rows."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    labels = {"test": torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]}

    def fit(sharpness: float) -> Result:
        noise = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
        logs = (sharpness * (logits + noise / 2)).log_softmax(1)
        return Result(labels, {"test": {"MAP": point(logs)}}, {})

    return [[fit(ours), fit(2.0), fit(0.8)] for ours in (0.2, 1.0)]  # one not sure enough, one too sure


def test_rows_average_to_the_metrics(fits: list[list[Result]]) -> None:
    result = fits[0][0]
    p, y = result.predictions["test"]["MAP"].probability, result.labels["test"]
    loss, confidence, right = by_row(result, "MAP").mean(0).tolist()
    assert (loss, right, confidence - right) == pytest.approx((nll(p, y), accuracy(p, y), signed_gap(p, y)), abs=1e-9)


def test_intervals_are_those_of_resampled_metrics(fits: list[list[Result]]) -> None:
    generator, drawn = torch.Generator().manual_seed(1), []
    for _ in range(DRAWS):
        pick = torch.randint(ROWS, (ROWS,), generator=generator)
        y = fits[0][0].labels["test"][pick]
        p = [[result.predictions["test"]["MAP"].probability[pick] for result in seed] for seed in fits]
        ratio = sum(nll(ours, y) for ours, _, _ in p) / sum(nll(scaled, y) for _, _, scaled in p)
        gap = statistics.fmean(abs(signed_gap(ours, y)) for ours, _, _ in p)
        points = statistics.fmean(100 * (accuracy(ours, y) - accuracy(plain, y)) for ours, plain, _ in p)
        drawn.append((ratio, gap, points))
    values = torch.tensor(drawn, dtype=torch.float64)
    expected = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T
    rows = {"set": [[by_row(result, "MAP") for result in seed] for seed in fits]}
    found = _intervals(rows, DRAWS)
    for name, limits, spread in zip(("nll", "gap", "points"), expected, values.std(0), strict=True):
        low, high = (float(number) for number in re.findall(r"[-+]?[\d.]+", found[name]))
        # 2,000 draws know a 2.5 % quantile to .06 standard deviations; four of them from each side, and the rounding
        assert (low, high) == pytest.approx(
            tuple(limits.tolist()), abs=0.34 * float(spread) + 0.05 * (name == "points")
        )
