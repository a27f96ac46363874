"""Candidates that share their prompt's row against each in a row of its own, for every architecture that is trusted
with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from posterior.curvature import kfac
from posterior.curvature.sketch import Sketch
from posterior.data.examples import Examples, collate
from posterior.laplace.linearized import moments
from posterior.likelihood.scores import BRANCHING, arranged, log_likelihood, scores
from posterior.likelihood.stacked import repeat, stack, stacked
from posterior.models import lora
from tests.posterior.conftest import VOCABULARY, make_examples, summed

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def questions() -> Examples:
    """Prompts of 2 to 8 tokens; three candidates of 1, 3 and 2 tokens."""
    rows = (
        replace(e, continuations=(e.continuations[0][:1], e.continuations[1], e.continuations[2][:2]))
        for e in make_examples(5, tokens=3)
    )
    return summed(*rows)


def network(kind: str, attention: str = "sdpa", **options):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES | options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model = lora.attach(model, rank=2, targets=["o_proj"])
    lora.put(model, {name: 0.3 * torch.randn_like(value) for name, value in lora.get(model).items()})
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", sorted(BRANCHING))
def test_scores_are_those_of_each_candidate_alone(kind, attention):
    """To 2e-5 of float32; the model's own logits of prompt and candidate are the reference."""
    model, batch = network(kind, attention), collate(questions())
    assert arranged(model, batch) is batch
    found = scores(model, batch)
    torch.testing.assert_close(found, scores(model, batch.separate()), rtol=2e-5, atol=2e-5)
    for row, example in enumerate(questions()):
        for c, tokens in enumerate(example.continuations):
            log_p = model(torch.tensor([example.prompt + tokens])).logits[0].log_softmax(-1)
            start = len(example.prompt) - 1
            expected = sum(log_p[start + t, token] for t, token in enumerate(tokens))
            torch.testing.assert_close(found[row, c], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mistral", {"sliding_window": 4}),
        ("bloom", {}),  # positions by the mask, not by position_ids
        ("gpt_neox", {}),  # not in the list
    ],
)
def test_others_have_a_row_for_each_candidate(kind, options):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES | options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    batch = collate(questions())
    assert arranged(model, batch).branch is None and len(arranged(model, batch).tokens) == 15
    alone = torch.cat([scores(model, collate(summed(example))) for example in questions()])
    torch.testing.assert_close(scores(model, batch), alone, rtol=2e-5, atol=2e-5)


def test_separate_rows_are_the_examples_one_by_one():
    examples = questions()
    batch = collate(examples).separate()
    assert bool((batch.mask[:, -1] == 1).all()) and bool((batch.tokens[batch.mask == 0] == 0).all())
    rows = zip(batch.tokens, batch.mask.bool(), batch.positions, batch.source, batch.target, strict=True)
    sequences = [(e.prompt, tokens) for e in examples for tokens in e.continuations]
    for (tokens, mask, positions, source, target), (prompt, answer) in zip(rows, sequences, strict=True):
        assert tokens[mask].tolist() == [*prompt, *answer]
        assert positions[mask].tolist() == list(range(len(prompt) + len(answer)))
        real = target[0] >= 0
        assert target[0][real].tolist() == list(answer)
        assert tokens[source[0][real]].tolist() == [prompt[-1], *answer[:-1]]
    assert batch.separate() is batch
    single = collate(make_examples(2))
    assert single.separate() is single


def test_gradients_and_curvature_are_those_of_separate_rows(model):
    """In float64: the gradient of the likelihood, the moments of scores, the traces of blocks and the sketch. (Blocks
    themselves differ: a Kronecker product takes the positions of a prompt for independent, once or C times.)"""
    batch = collate(questions())
    parameters = [module.weight.requires_grad_(True) for module in lora.matrices(model).values()]
    gradients = [
        torch.autograd.grad(log_likelihood(model, each).sum(), parameters) for each in (batch, batch.separate())
    ]
    for together, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(together, alone, rtol=3e-6, atol=1e-7)
    model.requires_grad_(False)
    found = []
    for each in (batch, batch.separate()):
        sketch = Sketch(lora.matrices(model), {}, 50)
        blocks = kfac.fit(model, lora.matrices(model), [each], sketch=sketch)
        law = sketch.full(2.0)
        traces = torch.stack([b.small.values.sum() * b.large.values.sum() for b in blocks.values()])
        found.append((traces, sketch.gram, *moments(model, lora.matrices(model), law, each)))
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)


def test_stacked_adapters_score_shared_rows(model):
    """Three particles in one pass, each a block of rows, as one at a time."""
    mean, batch = lora.get(model), collate(questions())
    thetas = [{name: value + 0.1 * k for name, value in mean.items()} for k in range(3)]
    with stacked(model, stack(thetas)):
        together = scores(model, repeat(batch, 3)).view(3, len(batch.label), -1)
    for theta, found in zip(thetas, together, strict=True):
        lora.put(model, theta)
        torch.testing.assert_close(found, scores(model, batch), rtol=1e-6, atol=1e-8)
