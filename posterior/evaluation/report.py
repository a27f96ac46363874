"""What `posterior evaluate` found, as JSON and as one HTML page that needs no network."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from posterior.calibration import metrics
from posterior.calibration.metrics import COVERAGE, METRICS, Estimate
from posterior.calibration.risk import Held
from posterior.evaluation import plots
from posterior.files import atomic

START = b"<!DOCTYPE html>\n"  # of a page
PAGES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
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
    "threshold": "The least confidence at which a question is answered, so that the share of wrong answers among those "
    "given is at most the one allowed, with 90 % probability over the calibration rows. - where those rows prove no "
    "such confidence: calibrate with more, or allow more.",
    "answered": "The share of test rows that have this confidence; the others are left to a person.",
    "wrong": "The share of wrong answers among the test rows that are answered.",
    "OOD AUROC": "Is it less sure of rows of another kind? The probability that one has a larger entropy than a test "
    "row: 1 always, 0.5 no better than a coin. Total entropy is all uncertainty about the answer; the epistemic part "
    "is what more training data would take away, of which the MAP knows nothing.",
}


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
    are calibration rows too; table: methods x metrics; sets: (share that cover, mean size) of each method; held: of
    each method, what the allowed error takes; ood_auroc:
    methods x ENTROPIES; curves: (probabilities [N, C], labels [N]) of each method; fit: the posterior's record."""

    posterior: Mapping[str, Any]
    base: Mapping[str, Any]
    data: Source
    calibration: Source | None
    repeated: int
    ood: Source | None
    table: Mapping[str, Mapping[str, Estimate]]
    sets: Mapping[str, tuple[float, float]]
    held: Mapping[str, Held]
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
                "max_risk": {method: each._asdict() for method, each in self.held.items()},
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
        if self.held:
            allowed = next(iter(self.held.values())).allowed
            held = [[method, *_shares(each)] for method, each in self.held.items()]
            found.append([[f"answers with an error of at most {allowed:g}", "threshold", "answered", "wrong"], *held])
        if self.ood_auroc:
            aurocs = [[name, *(f"{of[kind]:.3f}" for kind in ENTROPIES)] for name, of in self.ood_auroc.items()]
            found.append([["OOD AUROC", *(f"{kind} entropy" for kind in ENTROPIES)], *aurocs])
        return found

    def to_html(self) -> bytes:
        """One page: report.html, filled. Text is escaped, pictures are inside, and the browser is told to load nothing
        else."""
        known = {cell for table in self.tables() for cell in table[0]}
        about = {
            "posterior": f"{self.posterior['name']} ({self.posterior['family']}), {self.posterior['hash']}",
            "base": f"{self.base['id']} (revision {self.base['revision']}), {self.base['hash']}",
            "test rows": str(self.data),
            "calibration rows": self.calibration and f"{self.calibration}; {self.repeated} test rows are among them",
            "out-of-distribution rows": self.ood and str(self.ood),
        }
        pictures = {
            "reliability diagram": plots.reliability(self.curves),
            "risk-coverage curve": plots.risk_coverage(self.curves, self.held),
        }
        page = PAGES.get_template("report.html").render(
            title=f"Evaluation of {self.posterior['name']}",
            about={name: value for name, value in about.items() if value},
            tables=self.tables(),
            pictures={alt: b64encode(plots.png(figure)).decode() for alt, figure in pictures.items()},
            meaning={name: sentence for name, sentence in MEANING.items() if name in known},
            fit=json.dumps(self.fit, indent=1, ensure_ascii=False),
        )
        return page.encode(errors="xmlcharrefreplace")  # half of a surrogate pair, which names of files can hold

    def save(self, path: Path) -> None:
        """Write the page, atomically. Raises PosteriorError."""
        atomic.write(path, self.to_html())


def cells(table: Mapping[str, Mapping[str, Estimate]], rows: int) -> list[list[str]]:
    """Methods x metrics with their intervals, below a head; - for what is undefined."""
    body = [[name, *(str(found.get(metric, "-")) for metric in METRICS)] for name, found in table.items()]
    return [[f"{rows} rows", *METRICS], *body]


def _shares(held: Held) -> list[str]:
    """The cells of a method's answers; - where the rows prove no threshold."""
    if held.threshold is None:
        return ["-", "-", "-"]
    return [f"{held.threshold:.3f}", f"{held.answered:.3f}", "-" if math.isnan(held.wrong) else f"{held.wrong:.3f}"]


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


def markdown(table: Mapping[str, Mapping[str, Estimate]], rows: int) -> str:
    """A Markdown table: methods x metrics, with 95 % bootstrap intervals."""
    return markdown_rows(cells(table, rows))


def markdown_rows(table: Sequence[Sequence[str]]) -> str:
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([head, "|---" * len(table[0]) + "|", *rows])
