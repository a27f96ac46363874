"""benchmarks/unseen.py's dense algebra against the same with all parameters written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.unseen import Dense, best, dense, report
from posterior.data.examples import collate, encode
from posterior.models import lora
from posterior.models.base import load_model, load_tokenizer, resolve
from tests.posterior.conftest import dense_jacobian

PARAMETERS, SCORES, LAMBDA = 30, 8, 1.7


@pytest.fixture
def parts() -> tuple[Dense, Tensor, Tensor]:
    """(Dense, J [SCORES, PARAMETERS], theta* - theta_0), random."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    jacobian, moved, root, residual = normal(SCORES, PARAMETERS), normal(PARAMETERS), normal(SCORES, 5), normal(SCORES)
    found = Dense(jacobian @ jacobian.mT, root, residual, jacobian @ moved, float(moved.square().sum()), -3.0)
    return found, jacobian, moved


def curvature(found: Dense, jacobian: Tensor, precision: float) -> Tensor:
    """P = lambda I + J^T W J."""
    fisher = jacobian.mT @ found.root @ found.root.mT @ jacobian
    return fisher + precision * torch.eye(PARAMETERS, dtype=torch.float64)


@pytest.mark.parametrize("precision", [0.3, LAMBDA, 40.0])
def test_evidences_are_gaussian_integrals(parts: tuple[Dense, Tensor, Tensor], precision: float) -> None:
    found, jacobian, moved = parts
    p = curvature(found, jacobian, precision)
    log_det = float(torch.logdet(p)) - PARAMETERS * math.log(precision)
    at_mean = found.log_likelihood - precision * float(moved @ moved) / 2 - log_det / 2
    gradient = jacobian.mT @ found.residual - precision * moved
    assert found.evidence(precision) == pytest.approx(at_mean, rel=1e-9)
    gain = float(gradient @ torch.linalg.solve(p, gradient)) / 2
    assert found.local_evidence(precision) == pytest.approx(at_mean + gain, rel=1e-9)


def test_local_evidence_knows_no_movement_outside_the_span(parts: tuple[Dense, Tensor, Tensor]) -> None:
    found, jacobian, moved = parts
    inside = jacobian.mT @ torch.linalg.solve(found.gram, found.moved)  # of `moved`, in the span of the rows
    assert float(inside @ inside) < 0.9 * float(moved @ moved)
    shorter = Dense(
        found.gram, found.root, found.residual, found.moved, float(inside @ inside), found.log_likelihood
    )  # the same J (theta* - theta_0)
    assert shorter.local_evidence(LAMBDA) == found.local_evidence(LAMBDA)
    assert shorter.evidence(LAMBDA) > found.evidence(LAMBDA)


def test_covariance_is_that_of_all_parameters(parts: tuple[Dense, Tensor, Tensor]) -> None:
    found, jacobian, _ = parts
    other = torch.randn(3, PARAMETERS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = other @ torch.linalg.solve(curvature(found, jacobian, LAMBDA), other.mT)
    torch.testing.assert_close(found.covariance(other @ other.mT, other @ jacobian.mT, LAMBDA), expected)


def test_in_the_span_only_other_rows_lose_variance(parts: tuple[Dense, Tensor, Tensor]) -> None:
    found, jacobian, _ = parts
    torch.testing.assert_close(found.in_span(found.gram), found.gram)
    other = torch.randn(3, PARAMETERS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    projection = jacobian.mT @ torch.linalg.solve(found.gram, jacobian)
    torch.testing.assert_close(found.in_span(other @ jacobian.mT), other @ projection @ other.mT)
    assert bool((torch.diagonal(found.in_span(other @ jacobian.mT) - other @ other.mT) < 0).all())


def test_best_finds_the_highest() -> None:
    assert best(lambda precision: -(math.log(precision / 7) ** 2)) == pytest.approx(7, rel=1e-2)


def test_dense_has_the_jacobians_of_all_b(run_fit, tiny_base):
    posterior, base = run_fit(prior_precision="2"), resolve(str(tiny_base))
    model = lora.load_peft(load_model(base, torch.float32, "cpu"), posterior.map_dir).eval().requires_grad_(False)
    rows = [{"text": text, "label": 1} for text in ("one", "seventeen", "three")]
    examples = encode(posterior.task, load_tokenizer(base), rows)
    found, _ = dense(model, posterior, examples)
    exact = dense_jacobian(model, collate(examples))
    order = torch.tensor(sorted(range(3), key=lambda i: len(examples[i].prompt)))  # as batches of like length have them
    flat = {name: (j[:, 1] - j[:, 0])[order].flatten(1).double() for name, j in exact.items() if name.endswith(".B")}
    moved = sum(flat[name] @ lora.get(model)[name].flatten().double() for name in flat)
    torch.testing.assert_close(found.moved, moved, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.gram, sum(j @ j.mT for j in flat.values()), rtol=1e-3, atol=1e-6)


def test_report(run_fit, tiny_base):
    posterior = run_fit(prior_precision="2")
    train, other = ([{"text": f"{word} {i}", "label": i % 2} for i in range(6)] for word in ("row", "other"))
    lines = report(resolve(str(tiny_base)), posterior, train, other, "float32").splitlines()
    assert lines[0].startswith("lambda 2.00; ")
    table = {cells[1]: cells[2:] for line in lines[4:] if (cells := [cell.strip() for cell in line.split("|")])}
    assert float(table["none: theta* alone"][1]) == 0
    assert table["exact"][0] == table["exact, in the span"][0]  # on the training rows
    assert float(table["exact"][1]) > float(table["exact, in the span"][1])
