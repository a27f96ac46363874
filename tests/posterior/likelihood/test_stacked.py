"""K adapters in one forward pass: the same as one after the other."""

from __future__ import annotations

import pytest
import torch

from posterior.data.examples import collate
from posterior.likelihood.scores import log_likelihood
from posterior.likelihood.stacked import repeat, stack, stacked, unstack
from posterior.models import lora
from tests.posterior.conftest import make_examples


def thetas(model, count: int) -> list[lora.Theta]:
    generator = torch.Generator().manual_seed(5)
    return [
        {
            name: 0.3 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in lora.get(model).items()
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("tokens", [1, 2])  # the LM head's rows; teacher forcing, with several rows an example
def test_values_and_gradients_equal_a_loop(model, tokens):
    batch = collate(make_examples(4, tokens=tokens))
    particles = thetas(model, 3)
    before = lora.get(model)
    with stacked(model, stack(particles)):
        weights = {name: module.weight.requires_grad_() for name, module in lora.matrices(model).items()}
        together = log_likelihood(model, repeat(batch, 3)).view(3, -1)
        grads = dict(zip(weights, torch.autograd.grad(together.sum(), list(weights.values())), strict=True))
        assert all(grads[name].shape == (3, *value.shape) for name, value in before.items())
    for index, theta in enumerate(particles):
        lora.put(model, theta)
        single = {name: module.weight.requires_grad_() for name, module in lora.matrices(model).items()}
        alone = log_likelihood(model, batch)
        expected = torch.autograd.grad(alone.sum(), list(single.values()))
        torch.testing.assert_close(together[index], alone, rtol=1e-9, atol=1e-9)
        for name, grad in zip(single, expected, strict=True):
            assert float(grad.norm()) > 0
            torch.testing.assert_close(grads[name][index], grad, rtol=1e-8, atol=1e-9)


def test_the_base_is_read_once(model):
    """One call of every base layer, on K * B rows, and not one more parameter than the stacks hold."""
    batch = collate(make_examples(4))
    calls = []
    handles = [
        module.base_layer.register_forward_hook(lambda _m, args, _o: calls.append(args[0].shape[0]))
        for module in model.modules()
        if hasattr(module, "base_layer")
    ]
    size = sum(parameter.numel() for parameter in model.parameters())
    adapter = sum(value.numel() for value in lora.get(model).values())
    with stacked(model, stack(thetas(model, 3))):
        log_likelihood(model, repeat(batch, 3))
        assert sum(parameter.numel() for parameter in model.parameters()) == size + 2 * adapter
    for handle in handles:
        handle.remove()
    assert calls == [12] * 4  # q and v in two layers


def test_the_model_is_as_it_was_also_after_an_error(model):
    before, modules = lora.get(model), lora.matrices(model)
    with pytest.raises(KeyError), stacked(model, {}):
        pass
    with pytest.raises(ZeroDivisionError), stacked(model, stack(thetas(model, 2))):
        _ = 1 / 0
    assert lora.matrices(model) == modules
    assert all(torch.equal(before[name], value) for name, value in lora.get(model).items())


def test_stack_and_unstack(model):
    particles = thetas(model, 3)
    for theta, again in zip(particles, unstack(stack(particles)), strict=True):
        assert all(torch.equal(theta[name], again[name]) for name in theta)
