"""AdaLoRA adapters (Zhang et al. 2023, arXiv 2303.10512) as ordinary LoRA.

Their update is B diag(E) A alpha / (init_r + 1e-5), with A [r_l, in] and B [out, r_l] of each layer's own rank r_l. The
singular values E go into B: they start at zero, as LoRA's B does, while A's rows are of order one, as LoRA's are. Ranks
are filled up to init_r with zeros, so that the adapters of one recipe have one shape.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import pad

from posterior.errors import PosteriorError
from posterior.files import objects
from posterior.models import lora

EPSILON = 1e-5  # in PEFT's scale


@contextmanager
def ordinary(folder: Path) -> Iterator[Path]:
    """A PEFT folder that holds the adapter as plain LoRA: the folder itself, or for AdaLoRA a temporary one."""
    try:
        config = objects.read(folder / "adapter_config.json")
    except (OSError, ValueError):
        config = {}  # lora.read_config says what is wrong
    if config.get("peft_type") != "ADALORA":
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) / folder.name
        lora.write_adapter(work, *convert(folder, config))
        yield work


def convert(folder: Path, config: dict[str, Any]) -> tuple[lora.Theta, dict[str, Any]]:
    """theta and LoRA configuration of an AdaLoRA folder. Raises PosteriorError."""
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
        rank, alpha = int(config["init_r"]), float(config["lora_alpha"])
        if not (rank > 0 and alpha > 0):
            raise ValueError
        theta: lora.Theta = {}
        for name in sorted(key.removesuffix(".lora_E") for key in tensors if key.endswith(".lora_E")):
            a, b, e = (tensors.pop(f"{name}.lora_{part}") for part in "ABE")
            if len(e) > rank:
                raise ValueError
            short = name.removeprefix("base_model.model.")
            theta[f"{short}.A"] = pad(a, (0, 0, 0, rank - len(a)))
            theta[f"{short}.B"] = pad(b * e[:, 0], (0, rank - len(e))) * (rank / (rank + EPSILON))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, IndexError):
        raise PosteriorError(
            f"{folder} is no readable AdaLoRA adapter: its adapter_model.safetensors, init_r or lora_alpha is damaged"
        ) from None
    if tensors or not theta:
        raise PosteriorError(f"{folder} holds no A, B and E of AdaLoRA, or more than those; only those are supported")
    plain = {key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__}
    return theta, plain | {"peft_type": "LORA", "r": rank, "rank_pattern": {}, "use_rslora": False}
