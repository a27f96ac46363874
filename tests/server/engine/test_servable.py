"""posterior/models/servable.py beside vLLM's own loading code: what vLLM refuses we refuse, and what we take it
computes as PEFT does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from posterior.errors import PosteriorError
from posterior.models import lora, servable
from server.engine import Adapter
from server.engine.config import set_environment

set_environment("cpu")  # before vLLM, as the server does

from vllm.config.lora import LoRAConfig, MaxLoRARanks  # noqa: E402
from vllm.lora.lora_model import LoRAModel  # noqa: E402
from vllm.lora.peft_helper import PEFTHelper  # noqa: E402
from vllm.model_executor.models.llama import LlamaForCausalLM as VllmLlama  # noqa: E402

from server.engine.engine import _load_adapters  # noqa: E402

Change = Callable[[Path], Any]
PREFIX = "base_model.model.model.layers.0.self_attn"


def base() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def adapter(folder: Path, **options: Any) -> Path:
    """As PEFT itself saves it, with random matrices."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **options})
    model = get_peft_model(base(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        kept = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if value is not ...}
        path.write_text(json.dumps(kept))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        edit(found)
        save_file(found, folder / "adapter_model.safetensors")

    return change


def added(name: str, *shape: int) -> Change:
    return tensors(lambda found: found.update({name: torch.ones(shape)}))


def of_vllm(folder: Path) -> LoRAModel:
    """The adapter as vLLM's worker loads it when our server has chosen the rank. Raises whatever vLLM raises."""
    given = json.loads((folder / "adapter_config.json").read_text())
    wanted = max([given["r"], *(given.get("rank_pattern") or {}).values()])
    held = next((rank for rank in servable.RANKS if rank >= wanted), servable.RANKS[-1])
    helper = PEFTHelper.from_local_dir(str(folder), 1024)
    helper.validate_legal(LoRAConfig(max_lora_rank=held, max_loras=1))
    packed = [name for names in VllmLlama.packed_modules_mapping.values() for name in names]
    expected = {*packed, "o_proj", "down_proj", *VllmLlama.embedding_modules}
    return LoRAModel.from_local_checkpoint(
        str(folder), expected, helper, lora_model_id=1, device="cpu", dtype=torch.float32, model_vocab_size=40
    )


def check(folder: Path) -> None:
    """As `posterior import` and `posterior fit --adapter` do."""
    lora.read_config(folder)
    servable.check_theta(folder, lora.read_adapter(folder))
    lora.load_peft(base(), folder)


REFUSED_BY_BOTH: dict[str, Change] = {
    "rank": config(r=1024),
    "rank 0": config(r=0),
    "rank of a pattern": config(rank_pattern={"nothing": 1024}),
    "rank of a pattern, not whole": config(rank_pattern={"q_proj": "2"}),
    "no rank": config(r=...),
    "no alpha": config(lora_alpha=...),
    "alpha that is no number": config(lora_alpha="four"),
    "alpha of a pattern": config(alpha_pattern={"q_proj": "four"}),
    "no targets": config(target_modules=...),
    "dora": config(use_dora=True),
    "dora by a number": config(use_dora=1),
    "biases": config(bias="all"),
    "lora_bias": config(lora_bias=True),
    "modules_to_save": config(modules_to_save=["lm_head"]),
    "activated": config(alora_invocation_tokens=[5]),
    "replicated layers": config(layer_replication=[[0, 2]]),
    "block diagonal": config(use_bdlora={"nblocks": 2}),
    "qalora": config(use_qalora=True),
    **{init: config(init_lora_weights=init) for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")},
    "a tensor that is no LoRA": added(f"{PREFIX}.q_proj.weight", 16, 16),
    "trainable tokens": added("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 1, 16),
    "DoRA's vector": added(f"{PREFIX}.q_proj.lora_magnitude_vector.weight", 16),
    "a bias of B": added(f"{PREFIX}.q_proj.lora_B.bias", 16),
    "the adapter's name in a key": added(f"{PREFIX}.q_proj.lora_A.default.weight", 2, 16),
    "a module that the base lacks": added(f"{PREFIX}.query.lora_A.weight", 2, 16),
    "a norm": added("base_model.model.model.layers.0.input_layernorm.lora_A.weight", 2, 16),
    "no JSON object": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "no tensors": lambda folder: (folder / "adapter_model.safetensors").unlink(),
}
REFUSED_BY_US: dict[str, Change] = {  # vLLM takes them, and serves something else, or fails at the first request
    "kasa": config(kasa_config={"beta": 0.1}),
    "arrow": config(arrow_config={"top_k": 2}),
    "parameters": config(target_parameters=["mlp.experts"]),
    "token indices": config(trainable_token_indices=[3]),
    "a switch of a later PEFT": config(use_something_new=True),
    "vocabulary": added("base_model.model.lm_head.lora_A.weight", 2, 16),
    "embedding": added("base_model.model.model.embed_tokens.lora_embedding_A", 2, 40),
    "not finite": tensors(lambda found: next(iter(found.values())).fill_(torch.nan)),
    "whole numbers": tensors(lambda found: found.update({key: value.int() for key, value in found.items()})),
    "A without B": tensors(lambda found: found.pop(f"{PREFIX}.q_proj.lora_B.weight")),
    "no matrix at all": tensors(lambda found: found.clear()),
    "another rank": config(r=4),
    "twice": added("model.layers.0.self_attn.q_proj.lora_A.weight", 2, 16),
    "a layer that the base lacks": added(PREFIX.replace("layers.0", "layers.7") + ".q_proj.lora_A.weight", 2, 16),
}
TAKEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3}},
    "patterns and rslora": {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    "fraction": {"lora_alpha": 2.5},
    "all linear layers": {"target_modules": "all-linear"},
    "a pattern": {"target_modules": r".*\.(q_proj|down_proj)"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "whole names": {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("name", [*REFUSED_BY_BOTH, *REFUSED_BY_US])
def test_what_vllm_refuses_or_computes_otherwise_is_one_line(tmp_path: Path, name: str) -> None:
    folder = adapter(tmp_path / "a")
    (REFUSED_BY_BOTH | REFUSED_BY_US)[name](folder)
    if name in REFUSED_BY_BOTH:
        with pytest.raises(Exception):  # noqa: B017, PT011 - of any kind: it stops the start
            of_vllm(folder)
    else:
        of_vllm(folder)
    with pytest.raises(PosteriorError) as caught:
        check(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("name", TAKEN)
def test_what_we_take_vllm_computes_as_peft_does(tmp_path: Path, name: str) -> None:
    folder = adapter(tmp_path / "a", **TAKEN[name])
    check(folder)
    loaded, model = of_vllm(folder), PeftModel.from_pretrained(base(), str(folder))
    layers = {
        module.removeprefix("base_model.model."): layer
        for module, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert set(loaded.loras) == set(layers) == set(lora.modules(folder))
    for module, layer in layers.items():
        theirs = loaded.loras[module]
        update = theirs.lora_b @ theirs.lora_a * theirs.scaling
        torch.testing.assert_close(update, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


def test_the_ranks_are_vllms() -> None:
    assert get_args(MaxLoRARanks) == servable.RANKS


@pytest.mark.asyncio
async def test_an_adapter_that_the_engine_refuses_does_not_stop_the_others() -> None:
    adapters = [Adapter(f"a{number}", Path(f"/nowhere/{number}"), number) for number in (1, 2, 3)]
    llm = SimpleNamespace(errored=False, loaded=[], removed=[])

    async def add_lora(request: Any) -> None:
        if request.lora_int_id == 2:
            raise Exception("Call to add_lora method failed: expected target modules\nmore")
        llm.loaded.append(request.lora_int_id)

    async def remove_lora(number: int) -> None:
        llm.removed.append(number)

    llm.add_lora, llm.remove_lora = add_lora, remove_lora
    refused = await _load_adapters(llm, adapters)  # type: ignore[arg-type]
    assert refused == {adapters[1]: "expected target modules"} and llm.loaded == [1, 3] and llm.removed == [2]
    llm.errored = True
    with pytest.raises(Exception, match="add_lora"):
        await _load_adapters(llm, adapters)  # type: ignore[arg-type]
