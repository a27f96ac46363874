"""Text under the posterior predictive: what the particles' log-probabilities of its tokens say about it.

Particle k, of weight w_k, gives token t the probability p_k(y_t|y_<t, x). Two mixings:
- sequence (exact): p(y|x, D) = sum_k w_k prod_t p_k(y_t|y_<t, x). The next token's distribution is sum_k w_k(t) p_k
  with w_k(t) proportional to w_k prod_{s<t} p_k(y_s|y_<s, x): Bayes' rule, the text itself being the data;
- token: the weights stay w_k, so that every token's distribution is an average over the whole posterior.
Either way log p(y|x, D) = sum_t log sum_k w_k(t) p_k(y_t) = expected + information, with expected = sum_k w_k log
p_k(y|x) and information >= 0 by Jensen; under sequence mixing information = KL(w || w(T+1)), what the text tells
about the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mixing = Literal["sequence", "token"]


@dataclass(frozen=True)
class TextPredictive:
    """A text of T tokens under K particles; float64, nats.

    log_weights: [T + 1, K], normalised, those each token was drawn under and, last, those after the text;
    particles: log p_k(y_t|y_<t, x), [T, K];
    logprob, variance (of p_k(y_t) over the particles: epistemic), effective_particles 1 / sum_k w_k(t)^2: [T];
    total, aleatoric, epistemic: entropies of each token's distribution over the whole vocabulary, [T];
    expected: sum_k w_k log p_k(y|x); mc_error: standard error of log p(y|x, D) as an average of K weighted draws.
    """

    log_weights: Tensor
    particles: Tensor
    logprob: Tensor
    variance: Tensor
    effective_particles: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    expected: float
    mc_error: float

    @property
    def information(self) -> float:
        """log p(y|x, D) - sum_k w_k log p_k(y|x), at least 0."""
        return max(0.0, float(self.logprob.sum()) - self.expected)

    @property
    def mean_probability(self) -> float:
        """The geometric mean of the tokens' probabilities; 1 for no tokens."""
        return float(self.logprob.mean().exp()) if len(self.logprob) else 1.0


def text_predictive(
    log_p: Tensor, log_weights: Tensor, mixing: Mixing, total: Tensor, aleatoric: Tensor
) -> TextPredictive:
    """The predictive of T tokens, all of a text or a part of it.

    log_p: the particles' log-probabilities [T, K] of the tokens. log_weights: the logarithms [K] of the particles'
    weights before the first of them, normalised here: the posterior's, or for a later part the last row of
    `TextPredictive.log_weights` of what stands before it. total, aleatoric: the entropies [T] of the mixture and the
    weighted mean of the particles' own.
    """
    log_p, start = log_p.double(), log_weights.double().log_softmax(0)
    w = start.exp()
    log_weights = mixing_weights(log_p, start, mixing)
    now = log_weights[:-1]
    p, share = log_p.exp(), now.exp()
    mean = (share * p).sum(1)
    logprob = torch.logsumexp(now + log_p, 1)
    return TextPredictive(
        log_weights=log_weights,
        particles=log_p,
        logprob=logprob,
        variance=(share * (p - mean[:, None]).square()).sum(1),
        effective_particles=1 / share.square().sum(1),
        total=total.double(),
        aleatoric=torch.minimum(aleatoric.double(), total.double()),
        epistemic=(total.double() - aleatoric.double()).clamp(min=0),
        expected=float(torch.where(w > 0, w * log_p.sum(0), 0.0).sum()),
        mc_error=_mc_error(log_p, w, logprob, mixing),
    )


def _mc_error(log_p: Tensor, w: Tensor, logprob: Tensor, mixing: Mixing) -> float:
    """Delta method: particle k moves log p(y|x, D) by w_k times its influence. One particle has no error to tell."""
    concentration = float(w.square().sum())
    if concentration > 1 - 1e-12:
        return 0.0
    ratio = log_p - logprob[:, None]
    influence = ratio.sum(0).exp() - 1 if mixing == "sequence" else (ratio.exp() - 1).sum(0)
    moved = torch.where(w > 0, w * influence, 0.0)  # the influence of a particle without weight may be infinite
    return float((moved.square().sum() / (1 - concentration)).sqrt())


def mixing_weights(log_p: Tensor, log_weights: Tensor, mixing: Mixing) -> Tensor:
    """Normalised log-weights [T + 1, K] before each token of log_p [T, K] and after the last."""
    start = torch.zeros(1, log_p.shape[1], dtype=log_p.dtype)
    gained = torch.cat([start, log_p.cumsum(0)]) if mixing == "sequence" else start.expand(len(log_p) + 1, -1)
    return (log_weights + gained).log_softmax(1)
