"""Many candidates: covariances from the gradients of the likely ones, against dense Jacobians and by hand."""

from __future__ import annotations

import pytest
import torch

from posterior.curvature import kfac
from posterior.data.examples import collate
from posterior.laplace import blockwise
from posterior.laplace.linearized import moments
from posterior.likelihood import directions
from posterior.models import lora
from posterior.predictive.mixture import from_gaussian
from tests.posterior.conftest import dense_jacobian, make_examples, summed

ANSWERS, ROWS = 7, 4


@pytest.fixture
def law(model) -> blockwise.Covariance:
    curvature = kfac.fit(model, lora.matrices(model), [collate(make_examples(5))])
    return blockwise.Blocks(curvature, dict.fromkeys(curvature, 2.0))


@pytest.fixture
def batch():
    return collate(make_examples(ROWS, answers=ANSWERS))


def found(model, law, batch, factors=(1.0,)):
    return moments(model, lora.matrices(model), law, batch, factors)


def test_one_backward_pass_an_option_up_to_a_limit():
    assert [directions.passes(count) for count in (2, 4, 5, 17, 18, 255)] == [1, 3, 4, 16, 16, 16]


def test_up_to_four_candidates_have_all_their_differences():
    f = torch.randn(2, 4)
    torch.testing.assert_close(directions.directions(f) @ f[:, :, None], (f[:, 1:] - f[:, :1])[:, :, None])
    assert torch.equal(directions.movements(f)[0], torch.eye(4)[:, 1:])


@pytest.mark.parametrize("most", [1, 2, 16])
def test_groups_by_hand(monkeypatch, most):
    """Candidates in the order of their probability until they hold the mass, and all others as one."""
    monkeypatch.setattr(directions, "MOST", most)
    p = torch.tensor([[0.05, 0.6, 0.0004, 0.3495, 0.0001], [0.2] * 5], dtype=torch.float64)
    combinations, moved = directions.directions(p.log()), directions.movements(p.log())
    for row, kept in enumerate([[1, 3, 0], [0, 1, 2, 3, 4]]):
        kept = kept[:most]
        others = [c for c in range(5) if c not in kept]
        for number, c in enumerate(kept[1:]):
            expected = torch.zeros(5, dtype=torch.float64)
            expected[c], expected[kept[0]] = 1, -1
            torch.testing.assert_close(combinations[row, number], expected)
            assert moved[row, c].nonzero().flatten().tolist() == [number]
        if others:
            expected = torch.zeros(5, dtype=torch.float64)
            expected[others] = p[row, others] / p[row, others].sum()
            expected[kept[0]] = -1
            torch.testing.assert_close(combinations[row, len(kept) - 1], expected)
            assert all(moved[row, c].nonzero().flatten().tolist() == [len(kept) - 1] for c in others)
        assert not moved[row, kept[0]].any()
        assert not combinations[row, len(kept) - 1 + bool(others) :].any(), "zeros fill up"


def test_the_covariance_is_that_of_the_directions(model, law, batch):
    """E G J P^-1 J^T G^T E^T, with dense Jacobians and inverses; 1e-5 relative, for float32 sums."""
    f, covariance = found(model, law, batch, (1.0, 3.0))
    jacobians = dense_jacobian(model, batch)
    combine = directions.directions(f)
    moved = directions.movements(f)
    for number, factor in enumerate((1.0, 3.0)):
        expected = torch.zeros(ROWS, ANSWERS, ANSWERS, dtype=torch.float64)
        for name, block in law.curvature.items():
            j = lora.orient(name, jacobians[name]).double().flatten(2)
            small, large = (factor_matrix(each) for each in (block.small, block.large))
            precision = torch.kron(small, large) + 2.0 * factor * torch.eye(j.shape[2]).double()
            j = moved @ combine @ j
            expected += j @ torch.linalg.solve(precision, j.mT)
        expected += torch.diag_embed(directions.remainder(f, expected[None])[0])
        torch.testing.assert_close(covariance[number], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def factor_matrix(factor: kfac.Factor) -> torch.Tensor:
    basis, values = factor.basis.double(), factor.values.double()
    return basis @ torch.diag(values) @ basis.T + factor.rest * (torch.eye(len(basis)).double() - basis @ basis.T)


def test_all_gradients_give_the_exact_predictive(model, law, batch, monkeypatch):
    """With the whole mass asked for, the predictive is that of differences to the first: another origin of the scores
    is all that changes, which the integration's error (3e-3) allows for."""
    monkeypatch.setattr(directions, "MASS", 2.0)
    other, (ours,) = found(model, law, batch)
    monkeypatch.setattr(directions, "EXACT", ANSWERS)
    f, (exact,) = found(model, law, batch)
    torch.testing.assert_close(other, f)
    for row in range(ROWS):
        p, q = (from_gaussian(f[row], each[row], samples=2**14) for each in (ours, exact))
        torch.testing.assert_close(p.probability, q.probability, rtol=0, atol=3e-3)
        differences = torch.eye(ANSWERS, dtype=torch.float64) - torch.eye(ANSWERS, dtype=torch.float64)[:1]
        torch.testing.assert_close(
            differences @ ours[row] @ differences.T, exact[row], rtol=1e-4, atol=1e-4 * float(exact[row].abs().max())
        )


def test_rows_do_not_depend_on_their_batch(model, law, monkeypatch):
    """Rows of one batch may need different numbers of gradients."""
    monkeypatch.setattr(directions, "MASS", 0.7)
    examples = make_examples(ROWS, answers=ANSWERS)
    together, (each,) = found(model, law, collate(examples))
    for row, example in enumerate(examples):
        f, (covariance,) = found(model, law, collate(summed(example)))
        torch.testing.assert_close(f[0], together[row])
        torch.testing.assert_close(covariance[0], each[row], rtol=1e-4, atol=1e-6)


def test_few_columns_are_unbiased():
    """Over all 2^4 patterns of signs the mean of L L^T is exact; here over 4,000 draws, within 5 standard errors."""
    f = torch.randn(1, ANSWERS, dtype=torch.float64) * 2
    columns = kfac.fisher_columns(f[:, None])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([kfac.few(columns, generator) for _ in range(4000)])
    assert draws.shape[3] == directions.EXACT - 1
    products = draws @ draws.mT
    error = products.std(0) / len(draws) ** 0.5
    assert bool(((products.mean(0) - columns @ columns.mT).abs() <= 5 * error + 1e-12).all())
    assert torch.equal(draws[0, ..., :2], columns[..., -2:]), "the largest are exact"


def test_few_candidates_keep_their_columns():
    columns = kfac.fisher_columns(torch.randn(2, 1, 4))
    assert kfac.few(columns, torch.Generator()) is columns


def test_the_fisher_of_many_candidates_tends_to_the_exact_one(model):
    """The same rows many times over, each time with other signs: the mean's trace within 8 % of the exact one's (its
    own error is about 2 %)."""
    batch = collate(make_examples(3, answers=ANSWERS))
    many = kfac.fit(model, lora.matrices(model), [batch] * 240)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kfac, "EXACT", ANSWERS)
        exact = kfac.fit(model, lora.matrices(model), [batch])
    for name in exact:
        ours, wanted = (sum(float(part.sum()) for part in each[name].eigenvalues()[:2]) for each in (many, exact))
        assert ours / 240 == pytest.approx(wanted, rel=0.08), name


def test_candidates_that_share_a_direction_vary_as_much_as_the_others(monkeypatch):
    monkeypatch.setattr(directions, "MOST", 3)
    f = torch.tensor([[3.0, 2.0, 1.0, -1.0, -2.0], [5.0, -20.0, -21.0, -22.0, -23.0]], dtype=torch.float64)
    variance = torch.tensor([[0.0, 4.0, 2.0, 1.0, 5.0], [0.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    found = directions.remainder(f, torch.diag_embed(variance)[None])
    # the first row has gradients for the second and third candidate; the second one for none but the group of all
    assert found.tolist() == [[[0, 0, 0, 2.0, 0], [0, 0, 0, 0, 0]]]
    assert not directions.remainder(f[:, :4], torch.diag_embed(variance[:, :4])[None]).any()
