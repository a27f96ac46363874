"""What runs in workers, without torch: such a worker starts in a fraction of a second."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

KILLER = 13


class Weightless:
    """A footprint of nothing."""

    def bytes(self, _: object) -> float:
        return 0.0


def load(_base: object, folders: Mapping[str, tuple[Path, str]], _device: str) -> tuple[dict[str, Weightless], Any]:
    """Every posterior whose record is there."""
    refused = {name: "not there" for name, (folder, _) in folders.items() if not (folder / "posterior.json").is_file()}
    if len(refused) == len(folders):
        raise FileNotFoundError("posterior.json")
    return {name: Weightless() for name in folders if name not in refused}, refused


def moments(_name: str, prompts: list[tuple[int, ...]], candidates: list[tuple[Any, ...]], _room: float) -> list[Any]:
    """Zeros, but a certain token ends the process, as the kernel does for lack of memory."""
    if any(KILLER in prompt for prompt in prompts):
        os.kill(os.getpid(), signal.SIGKILL)
    return [(np.zeros(len(each)), np.zeros((len(each), len(each)))) for each in candidates]


def free(_device: str, _promised: float = 0.0) -> float:
    return 1.0


def load_nothing(_folders: Mapping[str, Path], _threshold: float) -> None: ...


def same(_name: str, _question: str, text: str, others: list[str]) -> list[bool]:
    """Equal texts are the same; a certain text ends the process."""
    if text == str(KILLER):
        os.kill(os.getpid(), signal.SIGKILL)
    return [text == other for other in others]
