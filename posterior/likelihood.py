"""Scores of the candidate answers, and the gradients of those scores at every LoRA matrix.

A choice's likelihood is softmax over C scores: the LM head's rows at the last prompt position when every candidate is
one token, which is log p(y|x) up to a constant per prompt, and the softmax removes that; else the mean of the
candidate's token log-probabilities, by teacher forcing. Their sum, log p(y|x) again, prefers short answers and is far
too sure (benchmarks/scores.py); tasks of older posteriors ask for it, and a text's likelihood is it. A choice's scores
are multiplied by the task's scale (posterior/scale.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from posterior.data import Batch
from posterior.predictive import normal_points, square_root

POINTS = 128  # of the expectation over the posterior of the scores


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """Scores f [B, C] in float32 (or float64 for a float64 model); p(y|x) = softmax(f) over C."""
    if batch.answer is not None:
        with _head_rows(model, batch.answer) as columns:
            return batch.scale * _upcast(_logits(model, batch, 1)[:, -1]).gather(1, columns)
    log_p, _ = _continuations(model, batch)
    if batch.mean:
        assert batch.target is not None
        log_p = log_p / (batch.target >= 0).sum(1)
    return batch.scale * log_p.view(len(batch.label), -1)


def log_likelihood(model: nn.Module, batch: Batch) -> Tensor:
    """log p(y_n|x_n, theta) [B] in nats: over the candidates (choice), or of the response's tokens (text).

    With a spread S_n it is the expectation over f ~ N(f_n, S_n), the likelihood term of the variational bound.
    """
    f = scores(model, batch)
    if f.shape[1] == 1:
        return f[:, 0]
    return draws(f, batch).log_softmax(2).mean(1).gather(1, batch.label[:, None])[:, 0]


def draws(f: Tensor, batch: Batch) -> Tensor:
    """Scores [B, M, C] spread by the posterior at M fixed quasi-Monte-Carlo points, or f itself with M = 1."""
    if batch.spread is None:
        return f[:, None]
    noise = normal_points(f.shape[1], POINTS, 0).to(f)
    return f[:, None] + noise @ square_root(batch.spread.double()).to(f).mT


def sampled_score(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """Sum over response tokens of log p(y_t|y_<t), with y_t drawn from the model itself (for a text task's Fisher)."""
    _, log_p = _continuations(model, batch)
    assert batch.target is not None
    flat = log_p.detach().flatten(0, 1).exp()
    drawn = torch.multinomial(flat.cpu(), 1, generator=generator).to(flat.device).view(log_p.shape[:2])
    drawn_log_p = log_p.gather(2, drawn[..., None])[..., 0]
    return drawn_log_p.masked_fill(batch.target < 0, 0.0).sum()


def _continuations(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(summed log-probabilities [S], token log-probabilities [S, L, V]) of the continuations."""
    assert batch.target is not None
    logits = _logits(model, batch, batch.target.shape[1] + 1)[:, :-1]
    log_p = _upcast(logits).log_softmax(-1)
    chosen = log_p.gather(2, batch.target.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(batch.target < 0, 0.0).sum(1), log_p


def _logits(model: nn.Module, batch: Batch, keep: int) -> Tensor:
    """Logits [S, keep, V] at the last `keep` positions, through the model's own head (so soft-capping and the like
    hold)."""
    out = model(
        input_ids=batch.tokens,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
        logits_to_keep=keep,
    )
    return out.logits[:, -keep:]  # type: ignore[no-any-return]


@contextmanager
def _head_rows(model: nn.Module, tokens: Tensor) -> Iterator[Tensor]:
    """Within, a plain head multiplies its rows of these tokens [B, C] alone, of some 10^5; yields where they stand in
    the logits. What the model does to logits afterwards it does to these."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear:  # it has an adapter of its own
        yield tokens
        return
    rows, columns = torch.unique(tokens, return_inverse=True)

    def forward(hidden: Tensor) -> Tensor:
        bias = None if head.bias is None else head.bias[rows]
        return nn.functional.linear(hidden, head.weight[rows], bias)

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield columns
    finally:
        del head.forward


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass
class Tape:
    """What one forward pass left behind: for each LoRA matrix its input a [S, T, in] and output z [S, T, out]."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def gradients(self, target: Tensor, cotangent: Tensor, *, keep: bool) -> dict[str, Tensor]:
        """d(cotangent . target)/dz [S, T, out] of every matrix, in one backward pass."""
        grads = torch.autograd.grad(target, list(self.outputs.values()), grad_outputs=cotangent, retain_graph=keep)
        return dict(zip(self.outputs, grads, strict=True))


@contextmanager
def record(matrices: dict[str, nn.Linear]) -> Iterator[Tape]:
    """Record inputs and outputs of the LoRA matrices during a forward pass (of a model whose parameters need no
    gradient)."""
    tape = Tape()

    def hook(name: str) -> object:
        def remember(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            tape.inputs[name] = args[0].detach()
            tape.outputs[name] = output if output.requires_grad else output.requires_grad_()
            return tape.outputs[name]

        return remember

    handles = [module.register_forward_hook(hook(name)) for name, module in matrices.items()]  # type: ignore[arg-type]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()
