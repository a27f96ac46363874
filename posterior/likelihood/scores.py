"""Scores of the candidate answers, and the gradients of those scores at every LoRA matrix.

A choice's likelihood is softmax over C scores: the LM head's rows at the last prompt position when every candidate is
one token, which is log p(y|x) up to a constant per prompt, and the softmax removes that; else the mean of the
candidate's token log-probabilities, by teacher forcing. Their sum, log p(y|x) again, prefers short answers and is far
too sure (benchmarks/scores.py); tasks of older posteriors ask for it, and a text's likelihood is it. A choice's scores
are multiplied by the task's scale (posterior/laplace/scale.py).

The prompt is computed once for all its candidates: they follow it in one row, each at the positions that it would have
alone, and an attention mask keeps them from seeing each other. Where a model does more than attend to what the mask
shows, or is not known not to, each candidate has a row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posterior.data.examples import Batch
from posterior.predictive.mixture import normal_points, square_root

POINTS = 128  # of the expectation over the posterior of the scores


def scores(model: nn.Module, batch: Batch) -> Tensor:
    """Scores f [B, C] in float32 (or float64 for a float64 model); p(y|x) = softmax(f) over C."""
    if batch.answer is not None:
        with _head_rows(model, batch.answer) as columns:
            return batch.scoring.scores(_upcast(_logits(model, batch, 1)[:, -1]).gather(1, columns), 1)
    batch = arranged(model, batch)
    log_p, index, token = _continuations(model, batch)
    return batch.scoring.scores(_at(log_p, index, token).sum(2), (token >= 0).sum(2)).view(len(batch.label), -1)


# Those whose layers mix tokens by nothing but attention, at rotary positions:
# tests/posterior/likelihood/test_branches.py.
BRANCHING = frozenset(
    ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
)
ATTENTION = ("eager", "sdpa", "short_or_float32")  # which heed a mask of their caller's


def branching(model: Any) -> float:
    """The longest row, in tokens, in which the model scores continuations side by side as it would score each alone."""
    config = model.config
    known = config.model_type in BRANCHING and config._attn_implementation in ATTENTION
    return (getattr(config, "sliding_window", None) or math.inf) if known else 0.0


def arranged(model: Any, batch: Batch) -> Batch:
    """The batch in rows that the model scores as it would score each continuation alone. `scores` takes care of it; who
    records a pass needs the rows that it was made of."""
    return batch if batch.tokens.shape[1] <= branching(model) else batch.separate()


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
    log_p, index, token = _continuations(model, batch)
    real = token >= 0
    drawn = torch.full_like(token, -1)
    p = log_p.detach()[index[real]].exp()
    drawn[real] = torch.multinomial(p.cpu(), 1, generator=generator)[:, 0].to(drawn)
    return _at(log_p, index, drawn).sum()


def _continuations(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [N, V] of every token at the N positions that predict one of a continuation; which of these
    predicts each [S, C, L], and the target [S, C, L]."""
    assert batch.target is not None and batch.source is not None
    rows = torch.arange(len(batch.tokens), device=batch.tokens.device)[:, None, None]
    place = batch.source - batch.source.min()  # among the last positions of each row
    used = torch.zeros(len(rows), -int(batch.source.min()), dtype=torch.bool, device=rows.device)
    used[rows, place] = True
    index = (used.flatten().cumsum(0) - 1).view_as(used)[rows, place]
    with _head_at(model, used) as alone:
        logits = _logits(model, batch, used.shape[1])
    logits = logits[0] if alone else logits[:, -used.shape[1] :][used]
    return _upcast(logits).log_softmax(-1), index, batch.target


def _at(log_p: Tensor, index: Tensor, token: Tensor) -> Tensor:
    """log_p [N, V] of each token [S, C, L] at its `index`; 0 where the token is negative."""
    return log_p[index, token.clamp(min=0)].masked_fill(token < 0, 0.0)


def _logits(model: Any, batch: Batch, keep: int) -> Tensor:
    """Logits through the model's own head (so soft-capping and the like hold), [S, keep, V] at the last `keep`
    positions; [S, T, V] of a model that does not know `logits_to_keep`."""
    logits: Tensor = model(
        input_ids=batch.tokens,
        attention_mask=batch.mask if batch.branch is None else _attention(model, batch.mask, batch.branch),
        position_ids=batch.positions,
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    return logits


def _attention(model: Any, mask: Tensor, branch: Tensor) -> Tensor:
    """[S, 1, T, T]: a token sees the prompt and its own continuation up to itself. As booleans, or (eager) what is
    added to the logits of attention."""
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    seen, own = branch[:, None, :], branch[:, :, None]
    allowed = causal & mask.bool()[:, None, :] & ((seen == 0) | (seen == own))
    allowed = (allowed | torch.eye(length, dtype=torch.bool, device=mask.device))[:, None]  # padding sees itself
    if model.config._attn_implementation != "eager":
        return allowed
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


@contextmanager
def _head_at(model: nn.Module, used: Tensor) -> Iterator[bool]:
    """Within, a plain head multiplies its rows at the used positions [S, M] alone, and logits are [1, N, V]; yields
    whether it is plain."""
    head = _plain_head(model)
    if head is None:
        yield False
        return
    hook = head.register_forward_pre_hook(lambda _head, hidden: hidden[0][:, -used.shape[1] :][used][None])
    try:
        yield True
    finally:
        hook.remove()


@contextmanager
def _head_rows(model: nn.Module, tokens: Tensor) -> Iterator[Tensor]:
    """Within, a plain head multiplies its rows of these tokens [B, C] alone, of some 10^5; yields where they stand in
    the logits. What the model does to logits afterwards it does to these."""
    head = _plain_head(model)
    if head is None:
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


def _plain_head(model: Any) -> nn.Linear | None:
    """The LM head; None where it has an adapter of its own."""
    head: nn.Module = model.get_output_embeddings()
    return head if type(head) is nn.Linear else None


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
