"""What benchmarks/fit.py compares Laplace with: the dense answer is dense, and ours is near it."""

from __future__ import annotations

import torch

from benchmarks import rivals
from posterior.data.examples import batches
from posterior.models import lora
from tests.posterior.conftest import make_examples, tiny_llama
from tests.posterior.curvature.test_sketch import OPEN, dense_covariance

DATA, ASKED = make_examples(9)[:6], make_examples(9)[3:]


def test_the_dense_answer(model, monkeypatch):
    """Woodbury's identity against the inverse of the whole precision matrix."""
    monkeypatch.setattr("tests.posterior.curvature.test_sketch.fixed", lambda model: {})
    rows, asked = ([batch for _, batch in batches(part, 4)] for part in (DATA, ASKED))
    found = rivals.dense(model, OPEN, rows, asked)
    for batch, variance in zip(asked, found, strict=True):
        expected = dense_covariance(model, batch, OPEN, DATA).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(variance, expected, rtol=1e-5, atol=1e-7)


def test_ours_is_nearer_to_the_dense_answer_than_the_prior_is() -> None:
    """Whole; the Kronecker factors are calibrated, not near. tests/oracles/run_rivals.py asks the other libraries."""
    found, prior = distances("ours, full")
    assert found < prior


def distances(name: str) -> tuple[float, float]:
    """How far a way's variances are from the dense answer, and how far the prior's: relative Frobenius distances."""
    model = lora.attach(tiny_llama(), rank=2, alpha=4, seed=1)
    generator = torch.Generator().manual_seed(2)
    lora.put(model, {key: 0.3 * torch.randn(w.shape, generator=generator) for key, w in lora.get(model).items()})
    rows, asked = ([batch for _, batch in batches(part, 4)] for part in (DATA, ASKED))
    exact, prior = (torch.cat(rivals.dense(model, OPEN, data, asked)) for data in (rows, rows[:0]))
    way = rivals.WAYS[name](model, OPEN)
    way.fit(rows)
    found = torch.cat([way.variance(batch) for batch in asked]).double()
    return float((found - exact).norm() / exact.norm()), float((prior - exact).norm() / exact.norm())
