"""The width of Laplace draws: against a brute-force search and a network that is linear."""

from __future__ import annotations

import pytest
import torch

from posterior.data.examples import Example, batches, collate
from posterior.laplace import blockwise, width
from posterior.laplace.linearized import moments
from posterior.likelihood.scores import scores
from posterior.models import lora
from posterior.predictive.mixture import from_gaussian
from tests.posterior.conftest import dense_jacobian, make_examples, summed
from tests.posterior.curvature.test_kfac import fit as curvature_of

PRECISION = 2.0  # wide enough for the tiny network to be far from linear


def law_of(model, examples, precision=PRECISION):
    curvature = curvature_of(model, examples)
    return blockwise.Blocks(curvature, dict.fromkeys(curvature, precision))


def fit(model, law, examples, batch_size=4):
    return width.fit(model, law, law.curvature, law.precision, examples, batch_size)


def brute_force(model, law, examples, w, seed=0) -> float:
    """Summed KL(linearised || mixture) of draws of this width, a row and a draw at a time."""
    mean, generator, total = lora.get(model), torch.Generator().manual_seed(seed), 0.0
    draws = [blockwise.sample(law.curvature, law.precision, mean, generator, w) for _ in range(width.DRAWS)]
    for example in examples:
        batch = collate(summed(example))
        f, (covariance,) = moments(model, lora.matrices(model), law, batch)
        p = from_gaussian(f[0], covariance[0]).probability
        q = torch.zeros_like(p)
        for draw in draws:
            lora.put(model, draw)
            q += scores(model, batch)[0].detach().double().softmax(0) / len(draws)
        lora.put(model, mean)
        total += float((p * (p.log() - q.log())).sum())
    return total


@pytest.mark.parametrize("tokens", [1, pytest.param(2, marks=pytest.mark.long)])
def test_no_width_is_nearer_to_the_linearised_predictive(model, tokens):
    """A grid of 9 widths finds none whose divergence is more than 1 % (the tolerance in w) below the chosen one's."""
    examples = make_examples(9, tokens=tokens)
    law = law_of(model, examples)
    chosen = fit(model, law, examples)
    rows = width.spliced(examples)
    grid = [brute_force(model, law, rows, step / 10) for step in range(1, 10)]
    assert 0.1 < chosen < 0.9, "an end of the range would show nothing"
    assert brute_force(model, law, rows, chosen) <= 1.01 * min(grid)


@pytest.mark.long
def test_a_linear_network_s_draws_keep_their_width(model, monkeypatch):
    """With the scores replaced by their linearisation (torch.func) and 256 draws: w within .1 of 1."""
    examples = make_examples(6)
    law = law_of(model, examples)
    mean = lora.get(model)
    linear = {}
    for example in width.spliced(examples):
        batch = collate(summed(example))
        linear[example.prompt] = (scores(model, batch).detach()[0], dense_jacobian(model, batch))

    def linearised_scores(model, batch):
        theta, rows = lora.get(model), []
        for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
            f, jacobian = linear[tuple(tokens[mask.bool()].tolist())]
            moved = (jacobian[name][0].flatten(1) @ (theta[name] - mean[name]).flatten() for name in mean)
            rows.append(f + sum(moved))
        return torch.stack(rows)

    monkeypatch.setattr(width, "scores", linearised_scores)
    monkeypatch.setattr(width, "DRAWS", 256)
    assert fit(model, law, examples) > 0.9


def test_the_adapter_stays_even_when_interrupted(model, monkeypatch):
    examples = make_examples(4)
    law, before = law_of(model, examples), lora.get(model)
    fit(model, law, examples)
    assert all(torch.equal(value, before[name]) for name, value in lora.get(model).items())

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(width, "scores", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(model, law, examples)
    assert all(torch.equal(value, before[name]) for name, value in lora.get(model).items())


def test_rows_are_spread_over_the_data(model, monkeypatch):
    """Of 70 rows, every second until there are enough."""
    seen = []

    def recorded(examples, size):
        seen.extend(examples)
        return batches(examples[:2], size)

    monkeypatch.setattr(width, "batches", recorded)
    examples = make_examples(70)
    fit(model, law_of(model, examples[:4]), examples)
    assert seen == list(width.spliced(examples)[::2][: width.ROWS])


def test_rows_are_halves_of_two():
    first, second = Example((1, 2, 3, 9), ((5,), (6,)), 1), Example((4, 5, 9), ((7,), (8,)), 0)
    assert width.spliced(summed(first, second)) == summed(
        Example((1, 2, 5, 9), ((5,), (6,)), 1),
        Example((4, 3, 9), ((7,), (8,)), 0),
    )
    assert width.spliced(summed(first)) == summed(first)
