"""Draws the Grafana dashboard of clients/grafana from a running Prometheus, where no Grafana can be had.

.venv/bin/python docs/figures/dashboard.py --prometheus http://127.0.0.1:9090 --minutes 10 --out dashboard.png

Each panel is drawn from its own query, at its own place: lines of a time series, a heat map of a histogram, the numbers
of a table. A query without data is said on its panel.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot  # noqa: E402  # the backend is chosen first
from matplotlib.axes import Axes  # noqa: E402

DASHBOARD = Path(__file__).parents[2] / "clients" / "grafana" / "dashboards" / "posterior.json"
STEPS = 60  # of a range
CELL = 0.42  # inches of a unit of the dashboard's grid, which is 24 wide
MOST = 6  # lines of a legend


@dataclass(frozen=True)
class Series:
    """The labels of a sample, and its values at `times`, minutes before now."""

    labels: dict[str, str]
    times: list[float]
    values: list[float]

    def legend(self, form: str) -> str:
        return re.sub(r"\{\{(\w+)\}\}", lambda found: self.labels.get(found[1], ""), form) or "value"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"))
    args = parser.parse_args()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    deepest = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = pyplot.figure(figsize=(24 * CELL, deepest * CELL))
    with httpx.Client(base_url=args.prometheus, timeout=30) as prometheus:
        for panel in panels:
            draw(figure, panel, deepest, prometheus, args.minutes)
    figure.savefig(args.out, dpi=80)
    print(args.out, args.out.stat().st_size, "bytes")


def draw(figure: Any, panel: dict[str, Any], deepest: int, prometheus: httpx.Client, minutes: float) -> None:
    """One panel, at its place."""
    place = panel["gridPos"]
    left, top = place["x"] / 24, 1 - place["y"] / deepest
    width, height = place["w"] / 24, place["h"] / deepest
    if panel["type"] == "row":
        figure.text(left + 0.005, top - height / 2, panel["title"], weight="bold", size=11, va="center")
        return
    unit = 1 / deepest
    axis = figure.add_axes((left + 0.035, top - height + 1.3 * unit, width - 0.045, height - 2.2 * unit))
    axis.set_title(panel["title"], size=8, loc="left")
    axis.tick_params(labelsize=6)
    targets = [
        (target.get("legendFormat", ""), read(prometheus, target["expr"], minutes)) for target in panel["targets"]
    ]
    if not any(series for _, series in targets):
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color="#a33")
        axis.set_xticks([])
        axis.set_yticks([])
    elif panel["type"] == "heatmap":
        heatmap(axis, targets[0][1])
    elif panel["type"] in ("stat", "table"):
        numbers(axis, panel, targets[0][1])
    else:
        lines(axis, targets)


def read(prometheus: httpx.Client, expression: str, minutes: float) -> list[Series]:
    """The series of a query over the last minutes, with every posterior chosen. Raises httpx.HTTPError."""
    now = time.time()
    query = expression.replace("$__rate_interval", "1m").replace("$posterior", ".*")
    span = {"start": now - 60 * minutes, "end": now, "step": 60 * minutes / STEPS}
    reply = prometheus.get("/api/v1/query_range", params={"query": query, **span}).raise_for_status().json()
    found = []
    for each in reply["data"]["result"]:
        points = [((at - now) / 60, float(value)) for at, value in each["values"]]
        points = [(at, value) for at, value in points if math.isfinite(value)]
        if points:
            found.append(Series(each["metric"], [at for at, _ in points], [value for _, value in points]))
    return found


def lines(axis: Axes, targets: list[tuple[str, list[Series]]]) -> None:
    """Each series as a line, minutes before now on the first axis."""
    for form, series in targets:
        for each in series:
            axis.plot(each.times, each.values, linewidth=1, label=each.legend(form))
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[:MOST], labels[:MOST], fontsize=5, loc="upper left", framealpha=0.6)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
    axis.grid(alpha=0.3)


def heatmap(axis: Axes, series: list[Series]) -> None:
    """What fell between two bounds of a histogram, as the difference of what was at most each."""
    rows = sorted(series, key=lambda each: float(each.labels["le"]))
    times = sorted({at for each in rows for at in each.times})
    below = [dict(zip(each.times, each.values, strict=True)) for each in rows]
    counts = [
        [max(upper.get(at, 0.0) - (below[n - 1].get(at, 0.0) if n else 0.0), 0.0) for at in times]
        for n, upper in enumerate(below)
    ]
    axis.pcolormesh(times, range(len(rows)), counts, cmap="Blues", shading="nearest")
    axis.set_yticks(range(len(rows)), [each.labels["le"] for each in rows], fontsize=5)


def numbers(axis: Axes, panel: dict[str, Any], series: list[Series]) -> None:
    """The last value, or of a table its labels."""
    axis.axis("off")
    if panel["type"] == "stat":
        axis.text(0.5, 0.5, f"{series[0].values[-1]:g}", ha="center", va="center", size=20, transform=axis.transAxes)
        return
    names = ("posterior", "hash", "family")
    shown = ["  ".join(f"{name}={each.labels.get(name, '')[:20]}" for name in names) for each in series]
    axis.text(0, 0.95, "\n".join(shown), va="top", size=6, family="monospace", transform=axis.transAxes)


if __name__ == "__main__":
    main()
