"""Devices by name."""

from __future__ import annotations

import re
from typing import Literal

import torch

from posterior.settings import SettingError

Dtype = Literal["float32", "bfloat16", "float16"]
HELP = "of the base: cpu, cuda, or one GPU such as cuda:1 (default: cuda where there is one, else cpu)"


def check(device: str | None) -> str:
    """The device, or where none is named, cuda if there is one, else cpu. Raises SettingError for one that this machine
    does not have."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", device)
    if kind is None:
        raise SettingError("{device} is {value!r}; it must be cpu, cuda, or one GPU such as cuda:1", value=device)
    if device.startswith("cuda") and int(kind[1] or 0) >= torch.cuda.device_count():
        raise SettingError(
            "{device} {value}: torch sees {count} GPUs here; use {device} cpu",
            value=device,
            count=torch.cuda.device_count(),
        )
    return device
