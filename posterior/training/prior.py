"""The prior of an adapter: N(theta_0, I / lambda) of each matrix, theta_0 the initialisation (A random, B zero)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

Grouping = Literal["scalar", "side", "layer"]


def prior_precision(theta: Mapping[str, Tensor], b: float) -> dict[str, float]:
    """Prior precisions by matrix: A's own (its initialisation's), and `b` for every B."""
    return dict.fromkeys(theta, b) | fixed_precision(theta)


def fixed_precision(theta: Mapping[str, Tensor]) -> dict[str, float]:
    """Those that no method chooses: every A's."""
    initial = {name: initial_precision(name, value) for name, value in theta.items()}
    return {name: value for name, value in initial.items() if value is not None}


def initial_precision(name: str, matrix: Tensor) -> float | None:
    """The precision of A's initialisation, 3 d_in (Kaiming-uniform, variance 1 / (3 d_in)); None for B, which starts at
    zero."""
    return 3.0 * matrix.shape[1] if name.endswith(".A") else None


def groups(names: list[str], grouping: Grouping) -> dict[str, list[str]]:
    """Which matrices share a prior precision: all ("scalar"), all A and all B ("side"), or each A,B pair ("layer")."""
    found: dict[str, list[str]] = {}
    for name in names:
        key = "all" if grouping == "scalar" else name[-1] if grouping == "side" else name[:-2]
        found.setdefault(key, []).append(name)
    return found
