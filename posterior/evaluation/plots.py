"""Plots of a predictive against true labels: curves are {name: (probabilities [N, C], labels [N])}."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import cycle
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from posterior.calibration import metrics
from posterior.calibration.risk import Held

Curves = Mapping[str, tuple[Tensor, Tensor]]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito 2008: told apart by all
DASHES, MARKERS = ("-", "--", "-.", ":"), "os^Dv"


def reliability(curves: Curves) -> Figure:
    """Accuracy against mean confidence in bins of equal width, and the rows in each bin below."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot((0, 1), (0, 1), color="grey", linewidth=1, label="calibrated")
    for name, style in _styles(curves):
        count, confidence, share = metrics.reliability(*curves[name])
        filled = count > 0
        above.plot(confidence[filled], share[filled], label=name, **style)
        below.plot(confidence[filled], count[filled], **style)
    above.set(
        ylabel="accuracy", xlim=(0, 1.02), ylim=(-0.02, 1.02), title="Reliability: below the diagonal is over-confident"
    )
    below.set(xlabel="confidence of the top answer", ylabel="rows", yscale="log", ylim=(0.7, None))
    figure.legend(loc="outside right upper")
    return figure


def risk_coverage(curves: Curves, held: Mapping[str, Held] | None = None) -> Figure:
    """The share of wrong answers against the share of answers that are kept, the most confident first; and of each
    curve the point where an allowed error, the horizontal line, makes it stop."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for name, style in _styles(curves):
        risk = metrics.risk_coverage(*curves[name])
        axes.plot(torch.arange(1, len(risk) + 1) / len(risk), risk, label=name, **style | {"marker": ""})
        if held and name in held and held[name].threshold is not None:
            axes.plot(held[name].answered, held[name].wrong, color=style["color"], marker="o", markersize=10)
    for allowed in {each.allowed for each in (held or {}).values()}:
        axes.axhline(allowed, color="grey", linewidth=1, label=f"allowed: {allowed:g}; a dot is where answers stop")
    axes.set(xlabel="coverage: share of answers kept", ylabel="risk: share of those that are wrong", xlim=(0, 1))
    axes.set(ylim=(0, None), title="Risk and coverage: lower is better")
    figure.legend(loc="outside right upper")
    return figure


def png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _styles(curves: Curves) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, colour, dash, marker in zip(curves, cycle(COLOURS), cycle(DASHES), cycle(MARKERS), strict=False):
        yield name, {"color": colour, "linestyle": dash, "marker": marker, "markersize": 5}
