"""The distance of histograms by hand, and its p-value in simulations."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from posterior.calibration.drift import CONFIDENCE, ENTROPY, FAMILIARITY, Reference, drift, histogram
from tests.posterior.calibration.made import draw, make


def test_bins_hold_their_upper_edge() -> None:
    assert histogram([0.0, 0.1, 0.10001, 0.2, 0.9], (0.1, 0.2)) == (2, 2, 1)
    for edges in (CONFIDENCE, ENTROPY, FAMILIARITY):
        assert list(edges) == sorted(set(edges))


def test_the_distance_is_the_largest_difference_of_the_shares_below_an_edge() -> None:
    held, live = (5, 3, 2, 0), (1, 3, 6, 10)
    below = [abs(sum(held[:k]) / 10 - sum(live[:k]) / 20) for k in range(5)]
    found = drift(held, live)
    assert found is not None and (found.n, found.held) == (20, 10)
    assert found.distance == pytest.approx(max(below)) == 0.6
    assert drift((0, 0), (1, 2)) is None and drift((1, 2), (0, 0)) is None


def test_a_record_has_the_histograms_of_its_rows() -> None:
    p, _ = draw(80)
    reference = make().reference
    assert reference is not None
    top = [max(row) for row in p.tolist()]
    assert reference.confidence[0] == sum(c <= CONFIDENCE[0] for c in top)
    assert reference.confidence[-1] == sum(c > CONFIDENCE[-1] for c in top)
    entropy = [-sum(q * np.log(q) for q in row) for row in p.tolist()]
    assert reference.entropy[3] == sum(ENTROPY[2] < h <= ENTROPY[3] for h in entropy)
    assert sum(reference.confidence) == sum(reference.entropy) == 80
    with pytest.raises(ValidationError, match="other bins"):
        Reference(confidence=(1, 2), entropy=reference.entropy)


def shares(runs: int, live: float, seed: int) -> float:
    """Of runs, the share with p <= .05: 200 rows of Beta(4, 1), and 500 answers of Beta(live, 1)."""
    generator, low = np.random.default_rng(seed), 0
    for _ in range(runs):
        held = histogram(generator.beta(4, 1, 200), CONFIDENCE)
        found = drift(held, histogram(generator.beta(live, 1, 500), CONFIDENCE))
        low += found is not None and found.p_value <= 0.05
    return low / runs


def test_false_alarms_are_no_more_than_the_p_value_says() -> None:
    assert shares(400, 4.0, seed=0) <= 0.05


def test_answers_that_are_less_sure_are_found() -> None:
    assert shares(100, 2.5, seed=1) >= 0.9
