"""`--init pissa`: an adapter that starts at the base's principal components (Meng et al. 2024, arXiv 2404.02948).

PiSSA takes W ~ s B_0 A_0 (the r largest singular values, split evenly) out of the base and trains A, B from A_0, B_0 on
the residual. Written as a difference to the base as it is, that is an ordinary LoRA of rank 2 r,
    W - s B_0 A_0 + s B A = W + s [B, -B_0] [A; A_0]
(what PEFT's path_initial_model_for_weight_conversion exports), and it is trained in this form: the second halves are
held, and the base keeps its own weights, which a residual in bfloat16 would round.

The prior's mean is the start, (A_0, B_0), of all members of an ensemble too, which then differ by the order of the data
only. Dropout's masks and SWAG's snapshots leave the held halves as they are; laplace, svgd, blob and ivon would spread
those as if they were uncertain, and do not take part.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from posterior.errors import PosteriorError
from posterior.models import lora


def attach(model: PreTrainedModel, *, rank: int, alpha: int, rslora: bool, **options: Any) -> PeftModel:
    """As lora.attach, with PiSSA of this rank: the adapter's rank is twice that, its scale the same, B A zero."""
    doubled = alpha * (math.sqrt(2) if rslora else 2)
    peft_model = lora.attach(model, rank=2 * rank, alpha=doubled, rslora=rslora, **options)
    for name, module in _layers(peft_model):
        weight = _base_weight(module)
        if rank > min(weight.shape):
            raise PosteriorError(f"rank {rank} is more than {name} has, {min(weight.shape)}; lower it")
        u, values, vt = torch.linalg.svd(weight.float(), full_matrices=False)
        root = (values[:rank] / module.scaling[lora.ADAPTER]).sqrt()
        a, b = _weights(module)
        with torch.no_grad():
            a[rank:] = root[:, None] * vt[:rank]
            b[:, rank:] = -u[:, :rank] * root
        _hold(a, torch.arange(2 * rank)[:, None] < rank)
        _hold(b, torch.arange(2 * rank) < rank)
    initialise(peft_model)
    return peft_model


def initialise(model: nn.Module) -> None:
    """The trained halves back at A_0 and B_0, which the held ones keep."""
    with torch.no_grad():
        for _, module in _layers(model):
            a, b = _weights(module)
            rank = len(a) // 2
            a[:rank] = a[rank:]
            b[:, :rank] = -b[:, rank:]


def _layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _base_weight(module: LoraLayer) -> Tensor:
    """W [out, in]; GPT-2's are stored transposed."""
    weight: Tensor = module.get_base_layer().weight  # type: ignore[assignment]
    return weight.T if getattr(module, "fan_in_fan_out", False) else weight


def _weights(module: LoraLayer) -> tuple[Tensor, Tensor]:
    return module.lora_A[lora.ADAPTER].weight, module.lora_B[lora.ADAPTER].weight  # type: ignore[return-value]


def _hold(weight: Tensor, trained: Tensor) -> None:
    """No gradient where `trained` is false, so that Adam stays where it is."""
    weight.register_hook(lambda gradient: gradient * trained.to(gradient))  # type: ignore[no-untyped-call]
