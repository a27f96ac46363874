"""What `posterior evaluate` found, as JSON and as one HTML page that needs no network."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, tostring

import torch
from torch import Tensor

from posterior.calibration import metrics
from posterior.calibration.metrics import COVERAGE, METRICS, Estimate
from posterior.evaluation import plots
from posterior.files import atomic

START = b"<!DOCTYPE html>\n"  # of a page
ENTROPIES = ("epistemic", "total")
MEANING = {
    "accuracy": "The share of rows whose most probable answer is the true one. Higher is better.",
    "nll": "How surprised it is by the true answer: mean negative log-probability, in nats. One that always gives the "
    "truth probability 1 has 0, an even guess between two answers 0.69. Lower is better.",
    "brier": "The mean squared distance of the probabilities from the truth, between 0 and 2. Lower is better.",
    "ece": "How far confidence is from accuracy: of the answers given with 80 % confidence, 80 % should be right. "
    f"Mean distance over {metrics.BINS} bins of equal width. 0 is calibrated.",
    "adaptive_ece": f"The same in {metrics.BINS} bins that hold equally many rows, so that none rests on a handful.",
    "gap": "Mean confidence minus accuracy. Above 0 it is over-confident, below 0 under-confident.",
    "auroc": "Does confidence tell right answers from wrong ones? The probability that a right one has more of it: "
    "1 always, 0.5 no better than a coin. Not defined (-) where all answers are right, or all wrong.",
    "aurc": "The share of wrong answers among those kept, averaged over how many are kept, the most confident first. "
    "Lower is better.",
    "covered": "The share of prediction sets that hold the true answer. A set lists all answers it takes to be right "
    f"for {100 * COVERAGE:g} % of rows like the calibration's, so it should be about that.",
    "size": "How many answers a prediction set lists on average. Fewer says more, at the same coverage.",
    "OOD AUROC": "Is it less sure of rows of another kind? The probability that one has a larger entropy than a test "
    "row: 1 always, 0.5 no better than a coin. Total entropy is all uncertainty about the answer; the epistemic part "
    "is what more training data would take away, of which the MAP knows nothing.",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .7rem; text-align: left; white-space: nowrap }
img { max-width: 100% } dt { font-weight: bold } pre { overflow-x: auto; background: #f4f4f4; padding: 1rem }
"""


@dataclass(frozen=True)
class Source:
    """A file of rows that was read: its name, the hash of the rows (`data_hash`), and how many."""

    file: str
    hash: str
    rows: int

    def __str__(self) -> str:
        return f"{self.file}: {self.rows} rows, {self.hash}"


@dataclass(frozen=True)
class Report:
    """One evaluation. posterior: {"name", "hash", "family"}; base: {"id", "revision", "hash"}; repeated: test rows that
    are calibration rows too; table: methods x metrics; sets: (share that cover, mean size) of each method; ood_auroc:
    methods x ENTROPIES; curves: (probabilities [N, C], labels [N]) of each method; fit: the posterior's record."""

    posterior: Mapping[str, Any]
    base: Mapping[str, Any]
    data: Source
    calibration: Source | None
    repeated: int
    ood: Source | None
    table: Mapping[str, Mapping[str, Estimate]]
    sets: Mapping[str, tuple[float, float]]
    ood_auroc: Mapping[str, Mapping[str, float]]
    curves: plots.Curves
    fit: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All of it; null for what is undefined or infinite."""
        found: dict[str, Any] = _finite(
            {
                "posterior": self.posterior,
                "base": self.base,
                "data": asdict(self.data),
                "calibration": self.calibration and asdict(self.calibration),
                "repeated": self.repeated,
                "ood": self.ood and asdict(self.ood),
                "table": {
                    method: {name: asdict(value) for name, value in estimates.items()}
                    for method, estimates in self.table.items()
                },
                "sets": {
                    method: {"coverage": COVERAGE, "covered": covered, "size": size}
                    for method, (covered, size) in self.sets.items()
                },
                "ood_auroc": self.ood_auroc,
                "curves": {method: _curve(*curve) for method, curve in self.curves.items()},
                "fit": self.fit,
            }
        )
        return found

    def tables(self) -> list[list[list[str]]]:
        """What was measured, in rows of cells, the head first: metrics, and where asked for prediction sets and OOD."""
        found = [cells(self.table, self.data.rows)]
        if self.sets:
            sets = [[method, f"{covered:.3f}", f"{size:.3f}"] for method, (covered, size) in self.sets.items()]
            found.append([[f"prediction sets at coverage {COVERAGE:g}", "covered", "size"], *sets])
        if self.ood_auroc:
            aurocs = [[name, *(f"{of[kind]:.3f}" for kind in ENTROPIES)] for name, of in self.ood_auroc.items()]
            found.append([["OOD AUROC", *(f"{kind} entropy" for kind in ENTROPIES)], *aurocs])
        return found

    def to_html(self) -> bytes:
        """One page. Text is escaped as it is serialised, pictures are inside, and the browser is told to load nothing
        else."""
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        known = {cell for table in self.tables() for cell in table[0]}
        about = {
            "posterior": f"{self.posterior['name']} ({self.posterior['family']}), {self.posterior['hash']}",
            "base": f"{self.base['id']} (revision {self.base['revision']}), {self.base['hash']}",
            "test rows": str(self.data),
            "calibration rows": self.calibration and f"{self.calibration}; {self.repeated} test rows are among them",
            "out-of-distribution rows": self.ood and str(self.ood),
        }
        title = f"Evaluation of {self.posterior['name']}"
        page = _tag(
            "html",
            _tag(
                "head",
                _tag("meta", charset="utf-8"),
                _tag("meta", content=policy, **{"http-equiv": "Content-Security-Policy"}),
                _tag("title", title),
                _tag("style", STYLE),
            ),
            _tag(
                "body",
                _tag("h1", title),
                _terms({name: value for name, value in about.items() if value}),
                _tag("h2", "What was measured"),
                _tag("p", "In brackets: the central 95 % interval over resampled test rows (bootstrap)."),
                *map(_table, self.tables()),
                _image("reliability diagram", plots.png(plots.reliability(self.curves))),
                _image("risk-coverage curve", plots.png(plots.risk_coverage(self.curves))),
                _tag("h2", "What it means"),
                _terms({name: sentence for name, sentence in MEANING.items() if name in known}),
                _tag("h2", "How the posterior was fitted"),
                _tag("pre", json.dumps(self.fit, indent=1, ensure_ascii=False)),
            ),
            lang="en",
        )
        text: bytes = tostring(page, encoding="utf-8", method="html")
        return START + text

    def save(self, path: Path) -> None:
        """Write the page, atomically. Raises PosteriorError."""
        atomic.write(path, self.to_html())


def cells(table: Mapping[str, Mapping[str, Estimate]], rows: int) -> list[list[str]]:
    """Methods x metrics with their intervals, below a head; - for what is undefined."""
    body = [[name, *(str(found.get(metric, "-")) for metric in METRICS)] for name, found in table.items()]
    return [[f"{rows} rows", *METRICS], *body]


def _curve(p: Tensor, y: Tensor) -> dict[str, Any]:
    """What the plots show: bins that are not empty, and the risk of the k most confident answers, k = 1..N."""
    bins = torch.stack(metrics.reliability(p, y), 1)
    return {
        "reliability": [
            {"rows": int(count), "confidence": confidence, "accuracy": share}
            for count, confidence, share in bins.tolist()
            if count
        ],
        "risk": metrics.risk_coverage(p, y).tolist(),
    }


def _finite(value: Any) -> Any:
    """JSON has no nan and no inf."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tag(tag: str, *children: Element | str, **attributes: str) -> Element:
    element = Element(tag, attributes)
    for child in children:
        if isinstance(child, str):
            element.text = child
        else:
            element.append(child)
    return element


def _table(rows: Sequence[Sequence[str]]) -> Element:
    head, *body = rows
    return _tag(
        "table",
        _tag("tr", *(_tag("th", cell) for cell in head)),
        *(_tag("tr", *(_tag("td", cell) for cell in row)) for row in body),
    )


def _terms(terms: Mapping[str, str]) -> Element:
    return _tag(
        "dl", *(_tag(tag, words) for pair in terms.items() for tag, words in zip(("dt", "dd"), pair, strict=True))
    )


def _image(alt: str, png: bytes) -> Element:
    return _tag("img", alt=alt, src="data:image/png;base64," + b64encode(png).decode())


def markdown(table: Mapping[str, Mapping[str, Estimate]], rows: int) -> str:
    """A Markdown table: methods x metrics, with 95 % bootstrap intervals."""
    return markdown_rows(cells(table, rows))


def markdown_rows(table: Sequence[Sequence[str]]) -> str:
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([head, "|---" * len(table[0]) + "|", *rows])
