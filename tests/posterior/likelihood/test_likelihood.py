"""Scores against the model's own logits, and expectations over the posterior of the scores against quadrature."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy import integrate, stats
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from posterior.curvature import kfac
from posterior.data.examples import Examples, collate
from posterior.data.scoring import Scoring
from posterior.likelihood.scores import draws, log_likelihood, scores
from posterior.models import lora
from tests.posterior.conftest import VOCABULARY, make_examples, summed


def test_single_token_scores_are_the_heads_rows(model):
    for example in make_examples(3):
        logits = model(torch.tensor([example.prompt])).logits[0, -1]
        expected = logits[[tokens[0] for tokens in example.continuations]]
        torch.testing.assert_close(scores(model, collate(summed(example)))[0], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", ["soft-capped", "adapted head"])
def test_what_the_model_does_to_logits_is_done_to_scores(case):
    """Gemma 2 squashes its logits; a head with an adapter is no plain product."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.5}
    if case == "soft-capped":
        network = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=1.0))
        network = lora.attach(network.eval(), rank=2)
    else:
        network = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
        network = lora.attach(network, rank=2, targets=["lm_head"])
    lora.put(network, {name: torch.randn_like(value) for name, value in lora.get(network).items()})
    example = make_examples(1, answers=4)[0]
    logits = network(torch.tensor([example.prompt])).logits[0, -1]
    expected = logits[[tokens[0] for tokens in example.continuations]]
    torch.testing.assert_close(scores(network, collate(summed(example)))[0], expected, rtol=1e-5, atol=1e-6)
    assert network(torch.tensor([example.prompt])).logits.shape[-1] == VOCABULARY  # the head is as it was


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_scale_multiplies_scores(model, tokens):
    example = make_examples(1, tokens=tokens)[0]
    expected = 0.3 * scores(model, collate(summed(example)))
    assert torch.equal(scores(model, collate(Examples([example], Scoring("sum", 0.3)))), expected)


@pytest.mark.parametrize("over", ["sum", "mean"])
def test_teacher_forced_scores_are_sums_or_means_of_log_probabilities(model, over):
    for example in make_examples(3, tokens=2):
        first, *others = example.continuations
        example = replace(example, continuations=(first[:1], *others))  # of different lengths
        batch = collate(Examples([example], Scoring(over)))
        for c, tokens in enumerate(example.continuations):
            log_p = model(torch.tensor([example.prompt + tokens])).logits[0].log_softmax(-1)
            start = len(example.prompt) - 1
            expected = sum(log_p[start + t, token] for t, token in enumerate(tokens)) / (
                len(tokens) if over == "mean" else 1
            )
            torch.testing.assert_close(scores(model, batch)[0, c], expected, rtol=1e-6, atol=1e-8)


def test_padding_does_not_change_scores(model):
    examples = make_examples(5)
    together = scores(model, collate(examples))
    for row, example in enumerate(examples):
        torch.testing.assert_close(together[row], scores(model, collate(summed(example)))[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variance", [0.0, 0.5, 6.0])
def test_expected_log_likelihood_and_fisher_are_integrals(model, variance):
    """Two answers, f_1 - f_0 ~ N(mu, variance): E[log sigmoid] and E[p (1 - p)] by quadrature, to 2 % at 128 points."""
    spread = torch.tensor([[0.0, 0.0], [0.0, variance]])
    example = replace(make_examples(1, answers=2)[0], label=1, spread=spread)
    batch = collate(summed(example))
    f = scores(model, batch).detach()
    mu = float(f[0, 1] - f[0, 0])

    def expectation(function):
        if not variance:
            return function(mu)
        density = stats.norm(mu, math.sqrt(variance))
        return integrate.quad(lambda x: density.pdf(x) * function(x), mu - 40, mu + 40, limit=400, points=[mu])[0]

    expected = expectation(lambda x: -math.log1p(math.exp(-x)))
    assert float(log_likelihood(model, batch)[0]) == pytest.approx(expected, rel=0.02)
    columns = kfac.fisher_columns(draws(f, batch))
    curvature = expectation(lambda x: 1 / (2 + 2 * math.cosh(x)))
    assert float(columns[0, 1, 0] ** 2) == pytest.approx(curvature, rel=0.02)
