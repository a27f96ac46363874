"""LoRA adapters as matrices: theta is the list of all A [r, in] and B [out, r], named like
"model.layers.0.self_attn.q_proj.A"."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from posterior.errors import PosteriorError, first_line
from posterior.files import objects
from posterior.files.tensors import save_file
from posterior.models import servable

if TYPE_CHECKING:  # seconds of import that a server's front end and `posterior inspect` do not need
    from peft import PeftModel
    from transformers import PreTrainedModel

Theta = dict[str, Tensor]
ADAPTER = "default"
DEFAULT_TARGETS = ("q_proj", "v_proj")


def attach(
    model: PreTrainedModel,
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = DEFAULT_TARGETS,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
    base_id: str | None = None,
) -> PeftModel:
    """The base with a fresh adapter (A random, B zero), trainable in float32 whatever the base's dtype."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it, whole or not
        target_modules=list(targets),
        lora_dropout=dropout,
        use_rslora=rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise PosteriorError(f"LoRA targets {list(targets)} do not fit this base: {first_line(error)}") from None
    peft_model.peft_config[ADAPTER].base_model_name_or_path = base_id
    return peft_model


def initialise(model: nn.Module, seed: int) -> None:
    """A fresh theta in place: A random as PEFT draws it, B zero."""
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters(ADAPTER, True)  # type: ignore[no-untyped-call]


def matrices(model: nn.Module, adapter: str = ADAPTER) -> dict[str, nn.Linear]:
    """The A and B modules by name, in the model's order. Refuses adapters that are more than plain LoRA on linear
    layers."""
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and adapter in module.lora_A:
            short = name.removeprefix("base_model.model.")
            for side, part in (("A", module.lora_A[adapter]), ("B", module.lora_B[adapter])):
                if not isinstance(part, nn.Linear) or part.bias is not None:
                    raise PosteriorError(
                        f"the adapter's part {short}.{side} is not a plain linear LoRA matrix; only those are supported"
                    )
                found[f"{short}.{side}"] = part
    if not found:
        raise PosteriorError("the model has no LoRA matrices")
    return found


def get(model: nn.Module, adapter: str = ADAPTER) -> Theta:
    """A copy of theta."""
    return {name: module.weight.detach().clone() for name, module in matrices(model, adapter).items()}


def orient(name: str, matrix: Tensor) -> Tensor:
    """A matrix of theta as [..., r, d], and back: A as it is, B transposed."""
    return matrix if name.endswith(".A") else matrix.mT


def put(model: nn.Module, theta: Mapping[str, Tensor], adapter: str = ADAPTER) -> None:
    """Overwrite theta in place."""
    with torch.no_grad():
        for name, module in matrices(model, adapter).items():
            module.weight.copy_(theta[name])


def load_peft(model: PreTrainedModel, folder: Path, *, name: str = ADAPTER) -> PeftModel:
    """The base with the adapter of a PEFT folder, frozen. Raises PosteriorError when it does not fit."""
    from peft import PeftModel

    config = read_config(folder)
    theta = read_adapter(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of missing keys, which are an error below
            peft_model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=False)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise PosteriorError(
            f"the adapter {folder} does not fit the base model: {str(error).strip().partition(chr(10))[0]}"
        ) from None
    shapes = {key: tuple(module.weight.shape) for key, module in matrices(peft_model, name).items()}
    if shapes != {key: tuple(value.shape) for key, value in theta.items()}:
        raise PosteriorError(
            f"the adapter {folder} (rank {config.get('r')}) does not fit the base model: its modules or shapes differ"
        )
    return peft_model


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder. Raises PosteriorError for what servable.check_config refuses."""
    try:
        config = objects.read(folder / "adapter_config.json")
    except (OSError, ValueError):
        raise PosteriorError(
            f"{folder} is no PEFT adapter: adapter_config.json is missing or not a JSON object"
        ) from None
    servable.check_config(folder, config)
    return config


def other_base(folder: Path, config: Mapping[str, Any], base_id: str) -> list[str]:
    """A warning where an adapter names another base than the one it is taken for."""
    named = config.get("base_model_name_or_path")
    return [] if named == base_id else [f"{folder} names its base {named!r}; it is taken for {base_id!r}"]


def read_adapter(folder: Path) -> Theta:
    """theta of a PEFT folder, from safetensors only."""
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError):
        raise PosteriorError(
            f"{folder} has no readable adapter_model.safetensors (pickled adapters are refused)"
        ) from None
    theta = {_short(folder, key): value for key, value in tensors.items()}
    if len(theta) < len(tensors):
        raise PosteriorError(f"{folder} holds matrices twice, with and without the prefix 'base_model.model.'")
    return theta


def modules(folder: Path) -> list[str]:
    """The modules that the adapter of a PEFT folder changes. Its tensors tell; target_modules may be a pattern."""
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            return sorted({_short(folder, key)[:-2] for key in file.keys()})  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError):
        raise PosteriorError(f"{folder} has no readable adapter_model.safetensors") from None


def size(folder: Path) -> int:
    """How many numbers the adapter of a PEFT folder has. Raises PosteriorError."""
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError):
        raise PosteriorError(f"{folder} has no readable adapter_model.safetensors") from None


def write_adapter(folder: Path, theta: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """An ordinary PEFT folder that PEFT and stock vLLM load."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{key[:-2]}.lora_{key[-1]}.weight": value.cpu().contiguous() for key, value in theta.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(
        json.dumps(dict(config), indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


def config_of(model: PeftModel) -> dict[str, Any]:
    """The adapter's configuration as JSON values, as PEFT writes it."""
    config = {key: value for key, value in model.peft_config[ADAPTER].to_dict().items()}
    for key, value in config.items():
        if isinstance(value, set):
            config[key] = sorted(value)
        elif hasattr(value, "value"):
            config[key] = value.value
    return config | {"inference_mode": True}


def _short(folder: Path, key: str) -> str:
    name = key.removeprefix("base_model.model.")
    for side in "AB":
        suffix = f".lora_{side}.weight"
        if name.endswith(suffix):
            return name.removesuffix(suffix) + f".{side}"
    raise PosteriorError(f"{folder} holds {key!r}, which is not a LoRA matrix; only plain LoRA is supported")
