"""Particles left out of a mixture: the estimates against brute force and simulation, and where they do not hold."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from scipy import stats
from torch import Tensor

from posterior.predictive.sequential import TOLERANCE, LeftOut, deviation, left_out, stages, unexplained

K = 8
EQUAL = torch.full((K,), 1 / K, dtype=torch.float64)


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [1]), (2, [2]), (3, [2, 3]), (8, [2, 3, 4, 6, 8]), (20, [2, 3, 4, 6, 9, 13, 19, 20])]
)
def test_stages_grow_by_half_up_to_all(k: int, expected: list[int]) -> None:
    assert list(stages(k)) == expected


def test_equal_weights_have_the_finite_population_correction() -> None:
    """Over all choices of n of 8 values, the mean squared error is what the first n estimate, on average."""
    x = torch.randn(K, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in (2, 3, 5, 7):
        assert unexplained(EQUAL, n) == pytest.approx(1 / n - 1 / K)
        parts = [x[list(chosen)] for chosen in combinations(range(K), n)]
        error = sum(float(part.mean() - x.mean()) ** 2 for part in parts) / len(parts)
        own = torch.full((n,), 1 / n, dtype=torch.float64)
        stated = sum(float(deviation(part, own)) ** 2 * unexplained(EQUAL, n) for part in parts) / len(parts)
        assert stated == pytest.approx(error)


def test_unequal_weights_have_the_error_of_independent_draws() -> None:
    weights = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.06, 0.04], dtype=torch.float64)
    x = torch.randn(200_000, len(weights), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for n in (2, 3, 5):
        own = weights[:n] / weights[:n].sum()
        errors = x[:, :n] @ own - x @ weights
        assert float(errors.square().mean()) == pytest.approx(unexplained(weights, n), rel=0.02)
        variances = deviation(x[:, :n].T, own).square()
        assert float(variances.mean()) == pytest.approx(1, rel=0.02), "unbiased"


def test_two_answers_by_hand() -> None:
    p = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.7, 0.3]], dtype=torch.float64)
    found = left_out(p, EQUAL)
    error = 0.1 * math.sqrt(1 / 3 - 1 / 8)  # of one answer; of the gap 0.6 it is twice that
    assert found.particles == 5
    assert found.total_variation == pytest.approx(error * 1.3213, rel=1e-4), "Student's, of two degrees of freedom"
    assert found.other_answer == pytest.approx(float(stats.t.sf(0.6 / (2 * error), 2)))


def test_nothing_left_out_changes_nothing() -> None:
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert left_out(p, torch.tensor([0.5, 0.5])) == LeftOut(0, 0.0, 0.0)
    assert left_out(p[:1], torch.tensor([1.0])).negligible


def test_particles_that_agree_are_enough_unless_two_answers_tie() -> None:
    sure = left_out(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), EQUAL)
    assert (sure.total_variation, sure.other_answer) == (0, 0) and sure.negligible
    tied = left_out(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), EQUAL)
    assert tied.other_answer == 0.5 and not tied.negligible


def stopped(p: Tensor, weights: Tensor) -> tuple[int, float, bool]:
    """Of one population [K, C] in the order given: particles used, total variation from all, whether the answer is
    another one."""
    for n in stages(len(p)):
        if left_out(p[:n], weights).negligible:
            break
    own, whole = weights[:n] / weights[:n].sum() @ p[:n], weights @ p
    return n, float((own - whole).abs().sum()) / 2, bool(own.argmax() != whole.argmax())


def populations(answers: int, spread: float, tails: float, generator: torch.Generator) -> Tensor:
    """[N, K, C]: each with a centre and a spread of its own; `tails`: degrees of freedom of the particles' scores."""
    n = 700
    centre = 2 * torch.randn(n, 1, answers, generator=generator, dtype=torch.float64)
    widths = spread * torch.randn(n, 1, 1, generator=generator, dtype=torch.float64).mul(0.7).exp()
    noise = torch.randn(n, K, answers, generator=generator, dtype=torch.float64)
    if math.isfinite(tails):
        squares = torch.randn(n, K, int(tails), generator=generator, dtype=torch.float64).square().mean(-1)
        noise = noise / squares.sqrt()[..., None]
    return (centre + widths * noise).softmax(-1)


@pytest.mark.parametrize("weights", [EQUAL, torch.arange(K, 0, -1).double() / 36], ids=["equal", "unequal"])
@pytest.mark.parametrize(
    ("answers", "spread", "tails", "most"),
    [(2, 0.2, math.inf, 1.0), (2, 0.5, math.inf, 1.0), (8, 0.2, math.inf, 1.0), (8, 0.2, 3.0, 1.0), (2, 1.0, 3.0, 2.0)],
)
def test_stops_keep_the_tolerance_over_all_prompts(
    answers: int, spread: float, tails: float, most: float, weights: Tensor
) -> None:
    """Up to a spread of half a nat; particles further apart, and with outliers, agree by chance too often."""
    generator = torch.Generator().manual_seed(2)
    found = [stopped(p, weights) for p in populations(answers, spread, tails, generator)]
    used, variation, changed = torch.tensor(found, dtype=torch.float64).T
    assert float(variation.mean()) <= most * TOLERANCE
    assert float(changed.mean()) <= TOLERANCE
    assert float(used.mean()) < K, "it spares something"


def test_what_stopped_prompts_state_is_too_low() -> None:
    """What the rule does not guarantee: a stop picks out estimates that are low by chance."""
    generator = torch.Generator().manual_seed(3)
    stated, true = [], []
    for p in populations(2, 0.5, math.inf, generator):
        n, variation, _ = stopped(p, EQUAL)
        if n < K:
            stated.append(left_out(p[:n], EQUAL).total_variation)
            true.append(variation)
    assert max(stated) <= TOLERANCE < sum(true) / len(true)
    assert sum(true) > 2 * sum(stated)


def test_one_particle_among_eight_that_disagrees_may_go_unseen() -> None:
    """What the rule does not guarantee: no two draws can tell."""
    p = torch.tensor([[0.9, 0.1]] * (K - 1) + [[0.1, 0.9]], dtype=torch.float64)
    outcomes = []
    for place in range(K):
        order = [*range(place), K - 1, *range(place, K - 1)]
        outcomes.append(stopped(p[order], EQUAL))
    assert [n for n, _, _ in outcomes] == [K, K] + [2] * 6
    assert [variation for _, variation, _ in outcomes] == pytest.approx([0, 0] + [0.8 / K] * 6)
