"""`--init pissa`: against PEFT's own PiSSA, and as an ordinary LoRA on the base as it is."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from posterior.errors import PosteriorError
from posterior.models import lora, pissa
from tests.posterior.conftest import tiny_llama

TOKENS = torch.arange(5, 15)[None]


def ours(rslora: bool = False) -> PeftModel:
    return pissa.attach(tiny_llama(), rank=2, alpha=6, rslora=rslora, seed=0)


def theirs(rslora: bool = False) -> PeftModel:
    config = LoraConfig(
        r=2, lora_alpha=6, use_rslora=rslora, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"
    )
    return get_peft_model(tiny_llama(), config)


def loss(model: PeftModel) -> torch.Tensor:
    return model(TOKENS).logits.log_softmax(-1)[0, :, 7].sum()


@pytest.mark.parametrize("rslora", [False, True])
def test_starts_as_the_base_with_peft_s_gradient(rslora):
    """Logits within 1e-5, and the gradients of A and B within 1e-4 of PEFT's PiSSA; the held halves have none."""
    one, other = ours(rslora).eval(), theirs(rslora).eval()
    with torch.no_grad():
        torch.testing.assert_close(one(TOKENS).logits, tiny_llama()(TOKENS).logits, rtol=1e-5, atol=1e-5)
    loss(one).backward()
    loss(other).backward()
    for (name, mine), (_, peft) in zip(lora.matrices(one).items(), lora.matrices(other).items(), strict=True):
        trained, held = mine.weight.grad.chunk(2, 0 if name.endswith(".A") else 1)
        expected = peft.weight.grad
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert float(trained.abs().max()) > 0 and not held.any()


@pytest.mark.parametrize("rslora", [False, True])
def test_is_the_difference_to_the_base(rslora):
    """A trained PiSSA of PEFT's, and the same A and B in ours: equal logits, to 1e-5."""
    one, other = ours(rslora).eval(), theirs(rslora).eval()
    generator = torch.Generator().manual_seed(3)
    theta = {name: v + 0.3 * torch.randn(v.shape, generator=generator) for name, v in lora.get(other).items()}
    lora.put(other, theta)
    held = {name: value.chunk(2, int(name.endswith(".B")))[1] for name, value in lora.get(one).items()}
    lora.put(one, {name: torch.cat([theta[name], held[name]], int(name.endswith(".B"))) for name in theta})
    with torch.no_grad():
        expected = other(TOKENS).logits
        torch.testing.assert_close(one(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, tiny_llama()(TOKENS).logits, atol=0.1)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["ensemble", "swag", "dropout"])
def test_fit(run_fit, tiny_base, tmp_path, method, rslora):
    """Every particle under PEFT on the base as it is, against the base with W - U S V^T + s B A put in by hand."""
    extra = {"rslora": True} if rslora else {}
    extra |= {"dropout": 0.2} if method == "dropout" else {}
    posterior = run_fit(method=method, init="pissa", particles=2, learning_rate=0.02, **extra)
    assert posterior.lora["r"] == 4 and posterior.prior["B"] == "mean: its initialisation"
    thetas = [lora.read_adapter(folder) for folder in posterior.adapters(2, tmp_path)]
    scale = 16 / 2**0.5 if rslora else 16 / 2
    for theta, folder in zip(thetas, posterior.adapters(2, tmp_path), strict=True):
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        with torch.no_grad():
            base = model(TOKENS).logits
            for name in [name[:-2] for name in theta if name.endswith(".A")]:
                weight = model.get_submodule(name).weight
                u, s, vt = torch.linalg.svd(weight)
                principal = (u[:, :2] * s[:2]) @ vt[:2]
                a, b = theta[f"{name}.A"], theta[f"{name}.B"]
                if method != "dropout":  # whose masks drop columns of the held half, too
                    torch.testing.assert_close(-scale * b[:, 2:] @ a[2:], principal, rtol=1e-4, atol=1e-5)
                    weight += scale * b[:, :2] @ a[:2] - principal
                else:
                    weight += scale * b @ a
            expected = model(TOKENS).logits
            plain = AutoModelForCausalLM.from_pretrained(tiny_base)
            found = PeftModel.from_pretrained(plain, str(folder))(TOKENS).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, base, atol=1e-3)
    for name, value in thetas[0].items():
        first, held = value.chunk(2, int(name.endswith(".B")))
        second, other = thetas[1][name].chunk(2, int(name.endswith(".B")))
        if method != "dropout":
            assert torch.equal(held, other) and not torch.equal(first, second)


def test_members_start_at_the_components_not_where_the_last_one_ended():
    model = ours()
    start = lora.get(model)
    moved = {}
    for name, value in start.items():
        side = int(name.endswith(".B"))
        trained, held = value.chunk(2, side)
        moved[name] = torch.cat([trained + 1, held], side)
    lora.put(model, moved)
    pissa.initialise(model)
    assert all(torch.equal(value, start[name]) for name, value in lora.get(model).items())


def test_a_rank_above_the_base_s_is_refused():
    with pytest.raises(PosteriorError, match="rank 9 is more than .*v_proj has, 8; lower it"):
        pissa.attach(tiny_llama(), rank=9, alpha=9, rslora=False)
