"""Checkpoints beside the base: what is a change of its linear matrices, and every other difference in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from posterior.errors import PosteriorError
from posterior.models import full

Change = Callable[[dict[str, Tensor]], Any]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases and a head of its own."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    config = LlamaConfig(**sizes, num_attention_heads=2, attention_bias=True, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder := tmp_path_factory.mktemp("bases") / "base")
    return folder


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def added(*names: str) -> Change:
    """A change of these tensors."""
    return lambda tensors: tensors.update({name: tensors[name] + 1 for name in names})


def trained(base: Path, folder: Path, change: Change) -> Path:
    """A copy of the base with other tensors."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edited(**changes: Any) -> Callable[[Path], Any]:
    """Another config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(("shape", "rank"), [((24, 16), 3), ((16, 24), 3), ((8, 16), 12), ((16, 16), 16)])
def test_the_nearest_product_is_numpys(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    a, b = full.nearest(matrix, rank)
    assert a.shape == (rank, shape[1]) and b.shape == (shape[0], rank)
    u, values, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    expected = (u[:, :rank] * values[:rank]) @ vt[:rank]
    np.testing.assert_allclose((b @ a).numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(a.norm(dim=1).numpy()[: len(values)], np.sqrt(values[:rank]), atol=1e-5)  # split evenly
    np.testing.assert_allclose(b.norm(dim=0).numpy()[: len(values)], np.sqrt(values[:rank]), atol=1e-5)


def test_the_error_is_of_the_singular_values_left_out(base: Path, model: Any, tmp_path: Path) -> None:
    """Eckart and Young's, by numpy; a module that the checkpoint does not change gets zeros, and no error."""
    down, other = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
    generator = torch.Generator().manual_seed(2)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in (Q, down):
            tensors[f"{name}.weight"] += torch.randn(tensors[f"{name}.weight"].shape, generator=generator)

    found = full.read(trained(base, tmp_path / "a", change), base, model)
    assert found.changed == (Q, down)
    made = full.cut(found, [Q, down, other], 5)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "a"))
    left, size = {}, {}
    for name in (Q, down):
        values = np.linalg.svd((after[f"{name}.weight"] - before[f"{name}.weight"]).double().numpy(), compute_uv=False)
        left[name], size[name] = float((values[5:] ** 2).sum()), float((values**2).sum())
        assert 0.1 < made.errors[name] == pytest.approx((left[name] / size[name]) ** 0.5, rel=1e-4)
    assert made.error == pytest.approx((sum(left.values()) / sum(size.values())) ** 0.5, rel=1e-4)
    assert made.errors[other] == 0 and not made.theta[f"{other}.A"].any() and not made.theta[f"{other}.B"].any()
    assert made.theta[f"{other}.A"].shape == (5, 16) and made.theta[f"{other}.B"].shape == (24, 5)


def test_in_place_the_model_is_the_checkpoint(base: Path, tmp_path: Path) -> None:
    """And the base again afterwards, also after an error."""
    model = AutoModelForCausalLM.from_pretrained(base)
    folder = trained(base, tmp_path / "a", added(f"{Q}.weight", "model.layers.1.mlp.gate_proj.weight"))
    own, tokens = AutoModelForCausalLM.from_pretrained(folder), torch.arange(10)[None]
    with torch.no_grad():
        before, expected = model(tokens).logits, own(tokens).logits
        with pytest.raises(KeyError), full.in_place(model, full.read(folder, base, model)):
            inside = model(tokens).logits
            raise KeyError
        assert torch.equal(inside, expected) and not torch.allclose(inside, before)
        assert torch.equal(model(tokens).logits, before)


NORM, BIASES = "model.layers.0.input_layernorm.weight", [f"model.layers.{n}.self_attn.q_proj.bias" for n in (0, 1)]
REFUSED: dict[str, tuple[Change, str]] = {
    "BitFit": (added(*BIASES), r"cannot hold: 2 biases \(model\.layers\.0\.self_attn\.q_proj\.bias, "),
    "norm": (added(NORM, f"{Q}.weight"), rf"cannot hold: 1 norms or other weights outside linear layers \({NORM}\); "),
    "head": (added("lm_head.weight"), r"cannot hold: 1 embeddings or heads \(lm_head\.weight\); train it with these"),
    "embedding": (added("model.embed_tokens.weight"), r"1 embeddings or heads \(model\.embed_tokens\.weight\)"),
    "several kinds": (added(NORM, *BIASES), r"1 norms or other .*; 2 biases \(.*\); train it with these frozen"),
    "serial adapter": (
        lambda tensors: tensors.update({f"model.layers.0.adapter.{n}.weight": torch.ones(2, 2) for n in "abcd"}),
        r"has 4 tensors that the base lacks \(.*a\.weight, .*b\.weight, .*c\.weight, \.\.\.\); serial adapters",
    ),
    "missing": (lambda tensors: tensors.pop(f"{Q}.weight"), rf"lacks 1 tensors of the base \({Q}\.weight\); copy it"),
    "shape": (
        lambda tensors: tensors.update({f"{Q}.weight": torch.ones(16, 8)}),
        r"q_proj\.weight as \[16, 8\], the base as \[16, 16\]; name the base that it was trained from",
    ),
    "rounded": (
        lambda tensors: tensors.update({f"{Q}.weight": tensors[f"{Q}.weight"].bfloat16()}),
        "as BF16, the base as F32; both must be F32, F16 or BF16, .* save it in the base's type or float32",
    ),
    "quantised": (
        lambda tensors: tensors.update({f"{Q}.weight": tensors[f"{Q}.weight"].to(torch.int8)}),
        "as I8, the base as F32; both must be",
    ),
    "not finite": (
        lambda tensors: tensors[f"{Q}.weight"][0].fill_(torch.nan),
        "a value in .*q_proj.weight that is not finite",
    ),
}
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (edited(architectures=["LlamaForSequenceClassification"]), "has architectures .*For.* the base"),
    "other kind": (edited(model_type="mistral"), "in config.json, the base .*; name the base that it was trained from"),
    "rotary base": (
        edited(rope_parameters={"rope_type": "default", "rope_theta": 5.0}),
        "has rope_par.* in config",
    ),
    "vocabulary": (edited(vocab_size=41), "has vocab_size 41 in config.json, the base .* 40; name the base"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "is no whole model: it has no config.json"),
    "bad configuration": (lambda f: (f / "config.json").write_text("{"), "the configuration of .* cannot be loaded"),
    "no folder": (shutil.rmtree, "is no whole model"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "a PEFT adapter, no whole model"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "holds pickled weights, which can run code and are refused",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "checkpoint .* has no model.safetensors"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-8]),
        "checkpoint .* has damaged weights",
    ),
    "header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        "checkpoint .* has damaged weights",
    ),
    "index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        "checkpoint .* has damaged weights .the weight_map",
    ),
    "index of another file": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}'),
        "checkpoint .* has damaged weights",
    ),
    "shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "1.safetensors"}}'),
        r"checkpoint .* is partial: 1\.safetensors missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_lora_is_one_line(base: Path, model: Any, tmp_path: Path, name: str) -> None:
    change, match = REFUSED[name]
    with pytest.raises(PosteriorError, match=match) as caught:
        full.read(trained(base, tmp_path / "a", change), base, model)
    assert "\n" not in str(caught.value) and str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_checkpoint_is_one_line(base: Path, model: Any, tmp_path: Path, name: str) -> None:
    change, match = DAMAGED[name]
    change(trained(base, tmp_path / "a", added(f"{Q}.weight")))
    with pytest.raises(PosteriorError, match=match) as caught:
        full.read(tmp_path / "a", base, model)
    assert "\n" not in str(caught.value) and str(tmp_path / "a") in str(caught.value)


def test_a_change_too_large_for_float32_is_one_line(base: Path, model: Any, tmp_path: Path) -> None:
    change: Change = lambda tensors: tensors[f"{Q}.weight"].copy_(3e38 * torch.randn(16, 16).sign())  # noqa: E731
    found = full.read(trained(base, tmp_path / "a", change), base, model)
    with pytest.raises(PosteriorError, match=f"a changes {Q} by more than float32 holds"):
        full.cut(found, [Q], 2)


def test_tied_embeddings_may_have_either_name_or_both(tiny_base: Path, tmp_path: Path) -> None:
    """A head of other values than the embeddings is a change of the head."""
    model, embedding, head = (
        AutoModelForCausalLM.from_pretrained(tiny_base),
        "model.embed_tokens.weight",
        "lm_head.weight",
    )

    def renamed(tensors: dict[str, Tensor]) -> None:
        tensors[head] = tensors.pop(embedding)

    both: Change = lambda tensors: tensors.update({head: tensors[embedding].clone()})  # noqa: E731
    for number, change in enumerate((renamed, both)):
        assert full.read(trained(tiny_base, tmp_path / str(number), change), tiny_base, model).changed == ()
    untied: Change = lambda tensors: tensors.update({head: tensors[embedding] + 1})  # noqa: E731
    with pytest.raises(PosteriorError, match=r"1 embeddings or heads \(lm_head\.weight\)"):
        full.read(trained(tiny_base, tmp_path / "untied", untied), tiny_base, model)


def test_the_types_may_differ_where_nothing_is_rounded(base: Path, model: Any, tmp_path: Path) -> None:
    """A checkpoint in float32 of a base in bfloat16: only what was trained differs, by what it was trained."""
    half = trained(base, tmp_path / "half", lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: value.float() for name, value in tensors.items()})
        tensors[f"{Q}.weight"] += 2**-20

    found = full.read(trained(half, tmp_path / "a", change), half, model)
    assert found.changed == (Q,)
    torch.testing.assert_close(found.difference(Q), torch.full((16, 16), 2**-20), rtol=0.05, atol=0)


def test_the_tokenizer_is_the_bases(tiny_base: Path, tmp_path: Path) -> None:
    """None is fine, a template of its own is told, and another vocabulary refused. Added tokens do no harm."""
    own, folder = AutoTokenizer.from_pretrained(tiny_base), tmp_path / "a"
    folder.mkdir()
    assert full.check_tokenizer(folder, own, chat=True) == []
    changed = AutoTokenizer.from_pretrained(tiny_base)
    changed.add_tokens(["<new>"])
    changed.chat_template = "{{ messages }}"
    changed.save_pretrained(folder)
    assert full.check_tokenizer(folder, own, chat=False) == []
    (line,) = full.check_tokenizer(folder, own, chat=True)
    assert "another chat template" in line
    with pytest.raises(PosteriorError, match=r"gives 1 tokens other numbers than the base \(<new>\)"):
        full.check_tokenizer(tiny_base, changed, chat=False)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(PosteriorError, match="the tokenizer of .*a cannot be loaded"):
        full.check_tokenizer(folder, own, chat=False)
