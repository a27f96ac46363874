"""Semantic entropies and their parts against brute force over all texts of a toy model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from posterior.predictive.meanings import meanings

WORDS, LENGTH, PARTICLES = 3, 4, 5
TEXTS = list(itertools.product(range(WORDS), repeat=LENGTH))


def meaning(text: tuple[int, ...]) -> int:
    """Of a text: how many of its words are 0."""
    return text.count(0)


def toy(seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p_k of every text [texts, K], words depending on the word before, and log-weights [K]."""
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(PARTICLES, WORDS + 1, WORDS, generator=generator, dtype=torch.float64)
    table = scores.log_softmax(2)
    rows = []
    for text in TEXTS:
        before = (WORDS, *text[:-1])
        rows.append(sum((table[:, a, b] for a, b in zip(before, text, strict=True)), torch.zeros(PARTICLES).double()))
    weights = torch.rand(PARTICLES, generator=generator, dtype=torch.float64)
    return torch.stack(rows), (weights / weights.sum()).log()


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p if x > 0)


def by_hand(log_p: Tensor, log_w: Tensor) -> tuple[dict[int, float], float, float]:
    """Probability of each meaning, total and aleatoric entropy, by loops."""
    w, p = log_w.exp().tolist(), log_p.exp().tolist()
    each = [{c: 0.0 for c in range(LENGTH + 1)} for _ in w]
    for text, row in zip(TEXTS, p, strict=True):
        for k in range(len(w)):
            each[k][meaning(text)] += row[k]
    mixture = {c: sum(w[k] * each[k][c] for k in range(len(w))) for c in range(LENGTH + 1)}
    aleatoric = sum(w[k] * entropy(list(each[k].values())) for k in range(len(w)))
    return mixture, entropy(list(mixture.values())), aleatoric


GROUPS = [meaning(text) for text in TEXTS]


@pytest.mark.parametrize("seed", range(3))
def test_with_all_texts_it_is_exact(seed: int) -> None:
    log_p, log_w = toy(seed)
    mass = (log_p + log_w).logsumexp(1).exp()
    found = meanings(log_p, log_w, GROUPS, mass=mass)
    mixture, total, aleatoric = by_hand(log_p, log_w)
    names = [GROUPS[found.example(m)] for m in range(len(found.error))]
    assert found.predictive.probability.tolist() == pytest.approx([mixture[name] for name in names], abs=1e-12)
    assert names == sorted(mixture, key=lambda name: -mixture[name]), "the most probable first"
    assert found.predictive.total == pytest.approx(total, abs=1e-9)
    assert found.predictive.aleatoric == pytest.approx(aleatoric, abs=1e-9)
    assert found.predictive.epistemic == pytest.approx(total - aleatoric, abs=1e-9)
    assert [names[g] for g in found.group.tolist()] == GROUPS


def draws(log_p: Tensor, log_w: Tensor, count: int, seed: int) -> Tensor:
    p = (log_p + log_w).logsumexp(1).exp()
    return torch.multinomial(p, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def test_of_draws_the_joint_is_unbiased_and_its_entropies_converge() -> None:
    log_p, log_w = toy(0)
    mixture, total, aleatoric = by_hand(log_p, log_w)
    mean = dict.fromkeys(mixture, 0.0)
    runs, few = 400, 12
    for seed in range(runs):
        index = draws(log_p, log_w, few, seed)
        found = meanings(log_p[index], log_w, [GROUPS[i] for i in index.tolist()])
        assert found.predictive.epistemic >= 0
        assert float(found.predictive.probability.sum()) == pytest.approx(1)
        for m, p in enumerate(found.predictive.probability.tolist()):
            mean[GROUPS[int(index[found.example(m)])]] += p / runs
    for name, p in mixture.items():  # four standard errors of the mean of 400 x 12 draws
        assert abs(mean[name] - p) < 4 * math.sqrt(p * (1 - p) / (runs * few)) + 1e-9
    index = draws(log_p, log_w, 40_000, 1)
    found = meanings(log_p[index], log_w, [GROUPS[i] for i in index.tolist()])
    # 40,000 draws: a standard error of .5 / 200 of each probability, and entropies within a few of these
    assert found.predictive.total == pytest.approx(total, abs=0.015)
    assert found.predictive.epistemic == pytest.approx(total - aleatoric, abs=0.015)


def test_particles_that_agree_leave_no_epistemic_part() -> None:
    log_p, log_w = toy(0)
    same = log_p[:, :1].expand(-1, PARTICLES)
    index = draws(same, log_w, 50, 0)
    found = meanings(same[index], log_w, [GROUPS[i] for i in index.tolist()])
    assert found.predictive.epistemic == pytest.approx(0, abs=1e-12)
    shares = torch.bincount(found.group).double() / 50
    assert found.predictive.probability.tolist() == pytest.approx(shares.tolist())
    assert found.error.tolist() == pytest.approx((shares * (1 - shares) / 50).sqrt().tolist())


def test_particles_that_each_have_their_own_answer_leave_nothing_else() -> None:
    """Two particles, two answers, each certain of its own: log 2 nats of doubt, all epistemic."""
    log_p = torch.tensor([[0.0, -1000.0], [-1000.0, 0.0]]).repeat(5, 1)
    found = meanings(log_p, torch.zeros(2), [7, 3] * 5)
    assert (found.predictive.total, found.predictive.epistemic) == pytest.approx((math.log(2), math.log(2)))
    assert found.predictive.interval.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    one = meanings(log_p[:1], torch.zeros(2), [7])  # the second particle says nothing about this answer
    assert one.predictive.probability.tolist() == [1.0] and one.predictive.total == 0.0
