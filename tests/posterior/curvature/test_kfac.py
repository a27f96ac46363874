"""Kronecker factors against dense Jacobians (torch.func) of a tiny model, in float64.

Tolerance 1e-6 relative against the dense Jacobians: Llama's RMSNorm and rotary tables compute in float32 even in a
float64 model.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from posterior.curvature import kfac
from posterior.data.examples import batches, collate
from posterior.errors import PosteriorError
from posterior.likelihood.scores import record, scores
from posterior.models import lora
from tests.posterior.conftest import dense_jacobian, make_examples, summed


def dense(block: kfac.Kronecker) -> Tensor:
    """The block's curvature as a matrix over vec of the [r, d] orientation (small index slow)."""

    def whole(factor: kfac.Factor) -> Tensor:
        basis = factor.basis
        return basis * factor.values @ basis.T + factor.rest * (torch.eye(len(basis)).to(basis) - basis @ basis.T)

    return torch.kron(whole(block.small), whole(block.large))


def exact_blocks(model, examples) -> dict[str, Tensor]:
    """The GGN's diagonal blocks, summed over examples: J^T (diag(p) - p p^T) J."""
    total: dict[str, Tensor] = {}
    for example in examples:
        batch = collate(summed(example))
        p = scores(model, batch)[0].softmax(0)
        middle = torch.diag(p) - p[:, None] * p
        for name, jacobian in dense_jacobian(model, batch).items():
            flat = lora.orient(name, jacobian[0]).flatten(1)
            total[name] = total.get(name, 0) + flat.T @ middle @ flat
    return total


def fit(model, examples, size=4, **options):
    return kfac.fit(model, lora.matrices(model), (batch for _, batch in batches(examples, size)), **options)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_is_the_exact_block_where_kfac_is_exact(model, sharing):
    """One example of one position: the gradient is one outer product, so the Kronecker product is the GGN block."""
    examples = make_examples(1, length=(1, 2))
    blocks = fit(model, examples, sharing=sharing)
    for name, exact in exact_blocks(model, examples).items():
        torch.testing.assert_close(
            dense(blocks[name]), exact, rtol=1e-6, atol=max(1e-12, 1e-6 * float(exact.abs().max()))
        )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_block_traces_are_exact(model, sharing, tokens):
    examples = make_examples(6, tokens=tokens)
    blocks = fit(model, examples, sharing=sharing)
    for name, exact in exact_blocks(model, examples).items():
        trace = float(blocks[name].small.values.sum() * blocks[name].large.values.sum())
        assert trace == pytest.approx(float(exact.trace()), rel=1e-6)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_batch_size_does_not_matter(model, sharing, tokens, rank):
    """Trap 4: mean-reduced losses make the curvature depend on the batch size. 1, 4 and 16 agree to 1e-5."""
    examples = make_examples(17, tokens=tokens)
    reference = fit(model, examples, size=16, sharing=sharing, rank=rank)
    for size in (1, 4):
        for name, block in fit(model, examples, size=size, sharing=sharing, rank=rank).items():
            torch.testing.assert_close(dense(block), dense(reference[name]), rtol=1e-5, atol=1e-8)


def test_padding_does_not_count(model):
    """Trap 6: a batch of a short and a long prompt gives what the two give alone."""
    short, long = make_examples(1, length=(2, 3))[0], make_examples(1, length=(9, 10))[0]
    together = kfac.fit(model, lora.matrices(model), [collate(summed(short, long))])
    alone = kfac.fit(model, lora.matrices(model), [collate(summed(short)), collate(summed(long))])
    for name in alone:
        torch.testing.assert_close(dense(together[name]), dense(alone[name]), rtol=1e-9, atol=1e-12)


def test_dropout_is_refused(model):
    """Trap 5: factors computed in training mode."""
    with pytest.raises(PosteriorError, match="eval"):
        fit(model.train(), make_examples(2))


def test_low_rank_keeps_the_trace_and_is_exact_when_the_rank_suffices(model):
    examples = make_examples(2, length=(2, 4))  # at most 6 positions in 16 dimensions
    full, low, cut = fit(model, examples), fit(model, examples, rank=8), fit(model, examples, rank=2)
    for name in full:
        torch.testing.assert_close(
            dense(low[name]), dense(full[name]), rtol=1e-4, atol=1e-4 * float(dense(full[name]).max())
        )
        assert float(dense(cut[name]).trace()) == pytest.approx(float(dense(full[name]).trace()), rel=1e-4)


def test_fisher_columns_are_a_root_of_the_multinomial_covariance():
    f = torch.randn(5, 4, dtype=torch.float64) * 3
    columns = kfac.fisher_columns(f[:, None])
    p = f.softmax(1)
    assert columns.shape == (5, 4, 3)
    torch.testing.assert_close(columns @ columns.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None, :])


def test_the_fisher_is_not_the_empirical_one(model):
    """Labels in the data do not enter: the expectation is over the model's own answers."""
    examples = make_examples(4)
    relabelled = summed(*(replace(e, label=(e.label + 1) % 3) for e in examples))
    first, second = fit(model, examples), fit(model, relabelled)
    for name in first:
        assert torch.equal(dense(first[name]), dense(second[name]))


def test_sampled_fisher_of_text_tends_to_the_exact_one(model):
    """One response token: the exact Fisher is over the whole vocabulary. 400 draws give its trace within 15 %."""
    example = make_examples(1, answers=1, length=(3, 4))[0]
    batch = collate(summed(example))
    with record(lora.matrices(model)) as tape:
        from posterior.likelihood.scores import _logits

        logits = _logits(model, batch, 2)[:, 0]
        p = logits.detach().softmax(1)[0]
        exact = dict.fromkeys(tape.inputs, 0.0)
        for token in range(len(p)):
            cotangent = -p.clone()
            cotangent[token] += 1
            for name, grad in tape.gradients(logits, cotangent[None], keep=True).items():
                exact[name] += float(p[token]) * float((grad.mT @ tape.inputs[name]).square().sum())
    blocks = kfac.fit(model, lora.matrices(model), [batch], samples=400, seed=5)
    for name, block in blocks.items():
        assert float(dense(block).trace()) == pytest.approx(exact[name], rel=0.15), name
