"""Which PEFT adapters can be served: vLLM loads them, and computes what PEFT computes.

vLLM reads an adapter when the server starts. What it would refuse then, or would ignore without a word, is refused
when a posterior is made. tests/server/engine/test_servable.py compares these rules with vLLM's own code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posterior.errors import PosteriorError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be
PLAIN_INITS = ("gaussian", "eva", "orthogonal")  # by name; the others (PiSSA, OLoRA, ...) change the base's weights
VOCABULARY = frozenset(("lm_head", "embed_tokens"))  # vLLM's prompt log-probabilities ignore adapters of these

# Settings that make an adapter more than A and B, however they are spelled.
MORE = ("alora_invocation_tokens", "layer_replication", "lora_bias", "modules_to_save", "target_parameters",
        "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora")  # fmt: skip
# Settings that may be true, a list or an object. Any other one, of this version of PEFT or a later one, may change what
# an adapter computes (arrow_config, kasa_config, ...).
HARMLESS = frozenset(
    (
        "alpha_pattern",
        "auto_mapping",
        "corda_config",  # of an initialisation, as the next three
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_ga_config",
        "rank_pattern",
        "runtime_config",
        "target_modules",
        "use_rslora",
    )
)


def check_config(where: Path | str, config: Any) -> None:
    """Raises PosteriorError for the contents of an adapter_config.json that are not plain LoRA, of a rank vLLM can
    hold."""
    if not isinstance(config, dict):
        raise PosteriorError(f"{where} is no PEFT adapter: adapter_config.json is not a JSON object")
    if config.get("peft_type") != "LORA":
        raise PosteriorError(f"{where} is a {config.get('peft_type')} adapter; only LORA is supported")
    if config.get("bias", "none") != "none":
        raise PosteriorError(f"{where} trains biases; only plain LoRA matrices are served: train it with bias none")
    init = config.get("init_lora_weights")
    if not isinstance(init, (bool, type(None))) and init not in PLAIN_INITS:
        raise PosteriorError(
            f"{where} was initialised by {init}, which changes the base's weights; convert it to an ordinary LoRA with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in config.items():
        unknown = key not in HARMLESS and (value is True or isinstance(value, (dict, list)))
        if value and (key in MORE or unknown):
            raise PosteriorError(
                f"{where} has {key} set in adapter_config.json; only plain LoRA matrices are served: train it without, "
                "or remove the setting if it does not change what the adapter computes"
            )
    _check_numbers(where, config)


def _check_numbers(where: Path | str, config: Mapping[str, Any]) -> None:
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    if not (isinstance(ranks, dict) and isinstance(alphas, dict)):
        raise PosteriorError(f"{where} has a rank_pattern or alpha_pattern that is not a JSON object; train it again")
    if not all(_is_number(rank) and rank == int(rank) and rank > 0 for rank in (config.get("r"), *ranks.values())):
        raise PosteriorError(f"{where} has a rank r that is not a whole number above 0; train it again")
    if not all(_is_number(alpha) for alpha in (config.get("lora_alpha"), *alphas.values())):
        raise PosteriorError(f"{where} has a lora_alpha that is not a number; train it again")
    if "target_modules" not in config:
        raise PosteriorError(f"{where} names no target_modules in adapter_config.json; vLLM asks for them")
    if rank(config) > RANKS[-1]:
        raise PosteriorError(f"{where} has rank {rank(config)}; vLLM serves up to {RANKS[-1]}: train it with less")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def rank(config: Mapping[str, Any]) -> int:
    """The largest rank of an adapter's modules."""
    return max(map(int, (config["r"], *(config.get("rank_pattern") or {}).values())))


def check_modules(where: Path | str, modules: Iterable[str]) -> None:
    """Raises PosteriorError for adapters of the vocabulary."""
    found = VOCABULARY & {part for name in modules for part in name.split(".")}
    if found:
        raise PosteriorError(
            f"{where} adapts {', '.join(sorted(found))}; only adapters inside the layers are served: train it with "
            "other targets"
        )


def check_theta(where: Path | str, theta: Mapping[str, Tensor]) -> None:
    """Raises PosteriorError for matrices that vLLM cannot serve, or that are not finite."""
    check_modules(where, theta)
    for name, value in theta.items():
        if not value.is_floating_point():
            raise PosteriorError(f"{where} holds {name} as {value.dtype}; matrices are floating-point numbers")
        if not bool(torch.isfinite(value).all()):
            raise PosteriorError(f"{where} holds a value in {name} that is not finite; train it again")
