"""The bound on the error of answered questions, by simulation and by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from posterior.calibration.risk import DELTA, STARTS, Held, Risk, needed


def simulated(n: int, sharpness: float, generator: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences c of two answers; an answer is right with a probability that grows with c, but is not c."""
    c = generator.uniform(0.5, 1.0, n)
    right = generator.uniform(size=n) < chance(c, sharpness)
    p = torch.tensor(np.stack([c, 1 - c], 1))
    return p, torch.tensor(np.where(right, 0, 1))


def chance(c: np.ndarray, sharpness: float) -> np.ndarray:
    return 1 - 0.5 * (2 * (1 - c)) ** sharpness


def true_error(threshold: float, sharpness: float) -> float:
    """Among c uniform on [threshold, 1], in closed form: the mean of .5 (2 (1 - c))^s."""
    width = 1 - threshold
    return 0.5 * 2**sharpness * width**sharpness / (sharpness + 1) if width > 0 else 0.0


@pytest.mark.parametrize("allowed", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("sharpness", [0.7, 1.0, 2.0])
def test_the_bound_holds_over_resamplings(allowed: float, sharpness: float) -> None:
    """The error is above the one allowed in at most DELTA of 400 sets of rows (and 3 standard deviations of that)."""
    generator = np.random.default_rng(0)
    broken = given = 0
    for _ in range(400):
        threshold = Risk.fit(*simulated(300, sharpness, generator)).threshold(allowed)
        if threshold is not None:
            given += 1
            broken += true_error(threshold, sharpness) > allowed
    assert broken / 400 <= DELTA + 3 * (DELTA * (1 - DELTA) / 400) ** 0.5
    if allowed == 0.1 and sharpness == 2.0:
        assert given > 200, "it must not hold by never answering"


def test_more_is_answered_where_more_is_allowed() -> None:
    risk = Risk.fit(*simulated(2000, 2.0, np.random.default_rng(1)))
    found = [risk.threshold(allowed) for allowed in (0.03, 0.05, 0.1)]
    assert all(found) and found == sorted(found, reverse=True)
    assert true_error(found[2], 2.0) > 0.07, "and not much less than could be"


def test_the_threshold_is_the_last_of_a_sequence_of_tests() -> None:
    """Against a loop over the rows, one test after the other."""
    generator = np.random.default_rng(2)
    for allowed in (0.05, 0.1, 0.3):
        risk = Risk.fit(*simulated(400, 1.0, generator))
        right = list(risk.right)
        best = None
        for start in np.linspace(needed(allowed) - 1, len(right), STARTS, endpoint=False).astype(int):
            for n in range(start + 1, len(right) + 1):
                if binom.cdf(right[:n].count(False), n, allowed) > DELTA / STARTS:
                    break
                best = n if best is None else max(best, n)
        expected = None if best is None else risk.confidence[best - 1]
        assert risk.threshold(allowed) == expected


def test_too_few_rows_prove_nothing() -> None:
    p = torch.tensor([[0.9, 0.1]], dtype=torch.float64).expand(200, 2) * 1.0
    y = torch.zeros(200, dtype=torch.long)
    assert needed(0.05) == 86
    for n, known in ((85, False), (86, True)):
        spread = p[:n] - torch.arange(n, dtype=torch.float64)[:, None] * torch.tensor([1e-6, -1e-6])
        assert (Risk.fit(spread, y[:n]).threshold(0.05) is not None) is known


def test_equal_confidences_stand_or_fall_together() -> None:
    p = torch.tensor([[0.9, 0.1]], dtype=torch.float64).repeat(200, 1)
    y = torch.zeros(200, dtype=torch.long)
    assert Risk.fit(p, y).threshold(0.05) == 0.9
    y[100:] = 1
    assert Risk.fit(p, y).threshold(0.05) is None


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        Risk(confidence=(0.9,), right=(True, False))
    with pytest.raises(ValueError, match="descending"):
        Risk(confidence=(0.8, 0.9), right=(True, False))


def test_what_an_allowed_error_comes_to_on_test_rows() -> None:
    right = Risk(confidence=tuple(1 - i / 1000 for i in range(500)), right=(True,) * 500)
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.51, 0.49]], dtype=torch.float64)
    found = Held.of(right, 0.05, p, torch.tensor([0, 0, 1, 0]))
    assert found == (0.05, 0.501, 1.0, 0.25)
    few = Risk(confidence=(0.9,), right=(True,))
    none = Held.of(few, 0.05, p, torch.tensor([0, 0, 1, 0]))
    assert none.threshold is None and none.answered == 0 and np.isnan(none.wrong)
