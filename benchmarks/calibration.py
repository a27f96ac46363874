"""Which posterior deserves trust? Every family on small fine-tuning sets, by what its probabilities are worth.

    python -m benchmarks.calibration                         yelp, whose sentences ship: missing cells, then the tables
    python -m benchmarks.calibration --data FOLDER --sets yelp sst2 --seeds 0 1 2 --minutes 60
    python -m benchmarks.calibration --data FOLDER --sets yelp sst2 --seeds 0 1 2 --minutes 0      only the tables

A cell (benchmarks/cells.py) takes minutes to two hours on 2 cores and is kept in benchmarks/results, so the grid is
run in as many sessions as it takes; what has not been run says so. Writes benchmarks/results/README.md and its plots.

Several tokens: a candidate's score is the mean of its tokens' log-probabilities, in the likelihood of the fit as in
all predictions (posterior/data/task.py). Their sum, log p(answer | prompt), prefers short answers and is surer than it
ought to be before any fit (benchmarks/scores.py).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor

from benchmarks.cells import FAMILIES, PARTICLES, POINTS, RESULTS, SLOW_EPOCHS, SLOW_RATE, Cell, Data, Result, read
from posterior.calibration.conformal import sets
from posterior.calibration.metrics import COVERAGE, METRICS, calibrated_ece, nll, ood_auroc
from posterior.calibration.scalers import CALIBRATORS, Method
from posterior.evaluation import plots
from posterior.evaluation.predictions import Predictions
from posterior.models.base import resolve
from posterior.predictive.mixture import entropy

SETS = ("yelp", "sst2", "arc_easy", "openbookqa", "arc_challenge")
LINEARISED = [family for family in FAMILIES if family.startswith("laplace")]
SAMPLED = [family for family in FAMILIES if family not in (*POINTS, "map-evidence", *LINEARISED)]
# The rows of a table: title, family, predictive.
METHODS = [
    ("MAP", "map", "MAP"),
    ("MAP, temperature", "map", "MAP+temperature"),
    ("MAP, platt", "map", "MAP+platt"),
    ("MAP, label smoothing", "label-smoothing", "MAP"),
    ("MAP, prior by evidence", "map-evidence", "MAP"),
    ("MAP, prior by evidence, temperature", "map-evidence", "MAP+temperature"),
    ("plain Laplace, full, linearised", "map-evidence", "linearized"),
    *((f"{family}, linearised", family, "linearized") for family in LINEARISED),
    ("laplace, linearised, temperature", "laplace", "linearized+temperature"),
    ("laplace, linearised, platt", "laplace", "linearized+platt"),
    (f"laplace, {PARTICLES} samples", "laplace", "particles"),
    *((f"{family}, {PARTICLES} particles", family, "particles") for family in SAMPLED),
]
DEFAULTS = ("laplace, linearised", f"laplace, {PARTICLES} samples")
CALIBRATED = ("MAP, platt", "laplace, linearised, temperature", "laplace, linearised, platt")
Values = dict[str, float]
Summaries = dict[str, dict[str, dict[int, Values]]]  # by set, title and seed
Rows = dict[str, dict[str, dict[int, Tensor]]]  # the same of `by_row`, and of `unseen`
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with sentiment/, sst2/, arc_easy/, ..., mmlu_cs/, mmlu_chem/")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["yelp"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="run in this order")
    parser.add_argument("--rows", type=int, default=128, help="training rows (default %(default)s)")
    parser.add_argument("--test-rows", type=int, help="at most (default: TEST or QUESTIONS of cells.py)")
    parser.add_argument("--epochs", type=int, default=8, help="more where answers have several tokens; see cells.py")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of the base, in fits and predictions: bfloat16 (default) as on a GPU; adapters are float32",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--work", type=Path, help="folder that keeps the fitted posteriors between runs")
    args = parser.parse_args()
    base, begun = resolve(), time.monotonic()
    data = [read(name, args.data, args.rows, args.test_rows) for name in args.sets]
    found: dict[tuple[str, int, str], Result] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            for each in data:
                for family in dict.fromkeys((*args.families, *FAMILIES)):  # the others are shown, not run
                    cell = Cell(each, seed, family, args.epochs, args.dtype)
                    result = cell.known(base)
                    if result is None and family in args.families and time.monotonic() - begun < 60 * args.minutes:
                        print(f"{cell.path.stem} ({(time.monotonic() - begun) / 60:.0f} min)", file=sys.stderr)
                        result = cell.run(base, args.work or Path(scratch))
                    if result is not None:
                        found[each.name, seed, family] = result
    text = report(data, args, found)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "README.md").write_text(text, encoding="utf-8")
    print(text)


def report(data: Sequence[Data], args: argparse.Namespace, found: Mapping[tuple[str, int, str], Result]) -> str:
    """All tables in Markdown; the plots, of the first seed, go to files beside them."""
    parts = [
        "# Which posterior deserves trust?\n\n"
        "Written by `python -m benchmarks.calibration --data FOLDER "
        f"--sets {' '.join(args.sets)} --seeds {' '.join(map(str, args.seeds))} --rows {args.rows} "
        f"--epochs {args.epochs} --dtype {args.dtype}`; each set's own data and seeds, see benchmarks/calibration.py. "
        f"Answers of several tokens: {SLOW_EPOCHS} times as many epochs, at a learning rate of {SLOW_RATE:g}; Laplace "
        "has the default rate, and the evidence says how many epochs and which scale of the scores "
        "(posterior/laplace/scale.py), which MAP leaves at 1. "
        "MAP has a weak prior on B (precision 1), and that of its initialisation on A. Means over the seeds that were "
        "run ± their standard error; a dash: undefined or not run. ECE with 15 bins of equal width, adaptive ECE of "
        "equal mass; ECE if calibrated: what so few rows would show if these probabilities were exact; gap: confidence "
        "minus accuracy; AUROC of right against wrong answers; AURC: area under "
        f"risk-coverage; cover, size: split-conformal sets (LAC) at {COVERAGE:.0%}, of a row's own probabilities where "
        "the server takes those before calibration; fit in epochs of MAP, predict in MAP forwards, of CPU time."
    ]
    summaries: Summaries = {}
    rows: Rows = {}
    gaps: Rows = {}
    for each in data:
        summaries[each.name], rows[each.name], gaps[each.name] = {}, {}, {}
        for title, family, predictive in METHODS:
            results = {seed: found[key] for seed in args.seeds if (key := (each.name, seed, family)) in found}
            summaries[each.name][title] = {seed: values(result, predictive) for seed, result in results.items()}
            rows[each.name][title] = {seed: by_row(result, predictive) for seed, result in results.items()}
            gaps[each.name][title] = {seed: unseen(result, predictive) for seed, result in results.items()}
        parts.append(table(each, summaries[each.name]))
        parts.append(figures(each, {k: v for k, v in found.items() if k[0] == each.name and k[1] == args.seeds[0]}))
    parts += [short(summaries), verdicts(summaries, rows, gaps)]
    return "\n\n".join(part for part in parts if part) + "\n"


def predictions(result: Result, part: str, predictive: str) -> Predictions:
    """Those of a cell; "MAP+temperature": MAP's, calibrated by that method of `posterior calibrate` on the calibration
    split."""
    own, _, method = predictive.partition("+")
    found = result.predictions[part][own]
    if not method:
        return found
    seen = result.predictions["calibration"][own].probability
    calibrator = CALIBRATORS[cast(Method, method)].fit(seen, result.labels["calibration"])
    probability = calibrator.apply(found.probability)
    return Predictions(probability, found.epistemic, entropy(probability))


def by_row(result: Result, predictive: str) -> Tensor:
    """NLL and accuracy of each test row [N, 2]."""
    p, y = predictions(result, "test", predictive).probability, result.labels["test"]
    return torch.stack([-p.gather(1, y[:, None])[:, 0].log(), (p.argmax(1) == y).to(p)], dim=1).double()


def unseen(result: Result, predictive: str) -> Tensor:
    """Confidence minus accuracy of each row [M] that nothing was fitted to: the test rows, and the calibration rows too
    for a predictive that is not calibrated on them. Their mean is the gap."""
    found = []
    for part in ("test",) if "+" in predictive else ("test", "calibration"):
        confidence, answer = predictions(result, part, predictive).probability.max(1)
        found.append(confidence - (answer == result.labels[part]).to(confidence))
    return torch.cat(found).double()


def values(result: Result, predictive: str) -> Values:
    """Every column of one cell's predictive."""
    p, y = predictions(result, "test", predictive), result.labels["test"]
    row = {name: metric(p.probability, y) for name, metric in METRICS.items()}
    row["ece if calibrated"] = calibrated_ece(p.probability)
    if "shift" in result.labels:
        row["shift nll"] = nll(predictions(result, "shift", predictive).probability, result.labels["shift"])
    outside = [predictions(result, part, predictive) for part in sorted(result.labels) if part.startswith("ood")]
    if outside:
        row["ood total"] = ood_auroc(p.total, torch.cat([each.total for each in outside]))
        if bool(p.epistemic.any()):
            row["ood epistemic"] = ood_auroc(p.epistemic, torch.cat([each.epistemic for each in outside]))
    calibration = predictions(result, "calibration", predictive).probability
    row["ece there"] = METRICS["ece"](calibration, result.labels["calibration"])
    row["gap unseen"] = float(unseen(result, predictive).mean())
    row["cover"], row["size"] = sets(calibration, result.labels["calibration"], p.probability, y)
    row["fit"] = result.seconds["fit"] / result.seconds["epoch"]
    row["predict"] = result.seconds[predictive.partition("+")[0]] / result.seconds["MAP"]
    return row


COLUMNS = (*METRICS, "ece if calibrated", "shift nll", "ood epistemic", "ood total", "cover", "size", "fit", "predict")
COARSE = ("fit", "predict")


def _digits(column: str) -> str:
    return ".1f" if column in COARSE else ".3f"


def table(data: Data, rows: Mapping[str, Mapping[int, Values]]) -> str:
    """Methods x columns, mean ± standard error over seeds; below it the methods that were not run."""
    lines = [
        f"## {data.name}: {len(data.train)} rows, {len(data.test)} test rows",
        "",
        "| | seeds | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for title, found in rows.items():
        cells = [_mean([row[name] for row in found.values() if name in row], _digits(name)) for name in COLUMNS]
        if found:
            lines.append(f"| {title} | {len(found)} | {' | '.join(cells)} |")
    if missing := [title for title, found in rows.items() if not found]:
        lines += ["", f"Not run: {'; '.join(missing)}."]
    return "\n".join(lines)


def short(summaries: Summaries) -> str:
    """The README's tables, in few columns: the sets on which every method was run, and the others."""
    complete = _complete(summaries)
    others = {each: rows for each, rows in summaries.items() if each not in complete}
    return "\n\n".join(["## In short", *(_short(part) for part in (complete, others) if part)])


def _complete(summaries: Summaries) -> Summaries:
    return {each: rows for each, rows in summaries.items() if all(rows.values())}


def _short(summaries: Summaries) -> str:
    names = ("nll", "ece")
    lines = [
        "| | seeds | fit | predict | " + " | ".join(f"{each}: {name}" for each in summaries for name in names) + " |",
        "|---" * (4 + len(names) * len(summaries)) + "|",
    ]
    for title, _, _ in METHODS:
        found = [list(rows[title].values()) for rows in summaries.values()]
        if not any(found):
            continue
        seeds = ", ".join(str(len(values)) for values in found)
        costs = [f"{_average(found, name):.1f}" for name in COARSE]
        cells = [_mean([row[name] for row in values], ".3f") for values in found for name in names]
        lines.append(f"| {title} | {' | '.join([seeds, *costs, *cells])} |")
    return "\n".join(lines)


def _mean(found: Sequence[float], digits: str) -> str:
    """± its standard error; digits: a format such as .3f or +.3f."""
    found = [value for value in found if not math.isnan(value)]
    if not found:
        return "-"
    text = f"{statistics.fmean(found):{digits}}"
    if len(found) < 2:
        return text
    return f"{text} ± {statistics.stdev(found) / math.sqrt(len(found)):{digits.removeprefix('+')}}"


def figures(data: Data, found: Mapping[tuple[str, int, str], Result]) -> str:
    """Reliability and risk-coverage of one seed's methods, as files; the Markdown that shows them."""
    curves = {}
    for title, family, predictive in METHODS:
        for (_, _, name), result in found.items():
            if name == family:
                curves[title] = (predictions(result, "test", predictive).probability, result.labels["test"])
    if not curves:
        return ""
    images = []
    for kind, plot in (("reliability", plots.reliability), ("risk-coverage", plots.risk_coverage)):
        path = RESULTS / f"{data.name}-{len(data.train)}-{kind}.png"
        path.write_bytes(plots.png(plot(curves)))
        images.append(f"![{kind} on {data.name}]({path.name})")
    return " ".join(images)


def verdicts(summaries: Summaries, rows: Rows, gaps: Rows) -> str:
    """The targets of the defaults, averaged over all sets, and over those on which every method was run."""
    lines = [
        "## Targets",
        "",
        "Averaged over the sets, and in each over the seeds, in which all methods of a comparison were run. The "
        "calibration rows are those that temperatures and Platt's are fitted to. Nothing else sees them, so for all "
        "else they are test rows too (those of questions come from the file of the training rows). Targets are judged "
        "on the test rows; the mean |gap| is given over both as well, as the noise of few rows adds to absolute "
        "values. In brackets: central 95 % over resampled rows, of these fits and temperatures.",
    ]
    for title in (*DEFAULTS, *CALIBRATED, *(f"{family}, {PARTICLES} particles" for family in SAMPLED)):
        for reference in ("MAP", "MAP, prior by evidence"):
            for each in (summaries, _complete(summaries)):
                titles = (title, reference, f"{reference}, temperature")
                found, drawn, excess = (
                    _paired({name: part[name] for name in each}, *titles) for part in (summaries, rows, gaps)
                )
                targets = _targets(found, drawn, excess) if found else "not run"
                lines.append(f"- {title}, against {reference}: {targets}")
    lines.append(_difference(summaries, f"svgd, {PARTICLES} particles", f"svgd-no-repulsion, {PARTICLES} particles"))
    lines += [
        _difference(summaries, f"{family}, linearised", DEFAULTS[0]) for family in LINEARISED if family != "laplace"
    ]
    return "\n".join(dict.fromkeys(lines))


def _targets(
    found: Mapping[str, Sequence[Sequence[Values]]],
    rows: Mapping[str, Sequence[Sequence[Tensor]]],
    gaps: Mapping[str, Sequence[Sequence[Tensor]]],
) -> str:
    """Of (ours, MAP, MAP with a temperature), by set; `rows` are theirs of `by_row`, `gaps` of `unseen`."""
    ours, plain, scaled = ([[fit[i] for fit in fits] for fits in found.values()] for i in range(3))
    ece = _average(ours, "ece") / _average(plain, "ece")
    ratio = _average(ours, "nll") / _average(scaled, "nll")
    points = 100 * (_average(ours, "accuracy") - _average(plain, "accuracy"))
    least = _average(ours, "ece if calibrated") / _average(plain, "ece")
    tempered = _average(scaled, "ece") / _average(plain, "ece")
    gap = _size(ours, "gap")
    around = _intervals(rows, gaps)
    targets: list[tuple[str, bool]] = [
        (
            f"ECE / its {ece:.2f} (<= 0.33; {least:.2f} if exactly calibrated, temperature scaling {tempered:.2f})",
            ece <= 1 / 3,
        ),
        (f"NLL / its temperature scaling's {ratio:.3f} {around['nll']} (<= 1)", ratio <= 1),
        (
            f"mean |gap| {gap:.3f} (<= 0.03; temperature scaling {_size(scaled, 'gap'):.3f}; ours on all rows it has "
            f"not seen {_size(ours, 'gap unseen'):.3f} {around['gap']})",
            gap <= 0.03,
        ),
        (f"accuracy {points:+.1f} {around['points']} points of its (>= -0.5)", points >= -0.5),
    ]
    there = _average(ours, "ece there") / _average(plain, "ece there")
    runs = ", ".join(f"{name} {len(rows)}" for name, rows in found.items())
    return (
        f"{runs}; "
        + "; ".join(f"{text} {'met' if met else 'MISSED'}" for text, met in targets)
        + f"; on the calibration rows: ECE / its {there:.2f}"
    )


def _intervals(
    rows: Mapping[str, Sequence[Sequence[Tensor]]], gaps: Mapping[str, Sequence[Sequence[Tensor]]], draws: int = 1000
) -> dict[str, str]:
    """The central 95 % of three targets' numbers over resampled rows, the same of a set for all its fits."""
    generator = torch.Generator().manual_seed(0)

    def resampled(each: Tensor) -> Tensor:
        """Means over the rows of [seed, method, row, ...] in each draw."""
        picks = torch.randint(each.shape[2], (draws, each.shape[2]), generator=generator)
        return torch.stack([each[:, :, pick].mean(2) for pick in picks])

    found = []
    for fits in rows.values():
        ours, plain, scaled = resampled(torch.stack([torch.stack(list(fit)) for fit in fits])).unbind(2)
        found.append(torch.stack([ours[..., 0], scaled[..., 0], ours[..., 1] - plain[..., 1]]).mean(2))
    nll, scaled_nll, difference = torch.stack(found).mean(0)
    sizes = [resampled(torch.stack([fit[0] for fit in fits])[:, None]).abs().mean((1, 2)) for fits in gaps.values()]
    gap = torch.stack(sizes).mean(0)
    numbers = {"nll": (nll / scaled_nll, ".3f"), "gap": (gap, ".3f"), "points": (100 * difference, "+.1f")}
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {
        name: f"[{', '.join(format(limit, form) for limit in value.quantile(levels).tolist())}]"
        for name, (value, form) in numbers.items()
    }


def _difference(summaries: Summaries, title: str, other: str) -> str:
    """Of the two methods' NLL and ECE, over all fits of both."""
    pairs = [pair for rows in _paired(summaries, title, other).values() for pair in rows]
    if not pairs:
        return f"- {title} against {other}: not run"
    parts = [f"{name} {_mean([one[name] - two[name] for one, two in pairs], '+.4f')}" for name in ("nll", "ece")]
    return f"- {title}, minus {other}: {', '.join(parts)} ({len(pairs)} fits of both)"


def _paired(summaries: Mapping[str, Mapping[str, Mapping[int, T]]], *titles: str) -> dict[str, list[list[T]]]:
    """What is known of these methods at the seeds where all were run, by set."""
    found: dict[str, list[list[T]]] = {}
    for each, rows in summaries.items():
        if seeds := set.intersection(*(set(rows[title]) for title in titles)):
            found[each] = [[rows[title][seed] for title in titles] for seed in sorted(seeds)]
    return found


def _size(found: Sequence[Sequence[Values]], column: str) -> float:
    """The average of absolute values."""
    return statistics.fmean(statistics.fmean(abs(row[column]) for row in rows) for rows in found)


def _average(found: Sequence[Sequence[Values]], column: str) -> float:
    """Over the sets, each the mean of its seeds."""
    return statistics.fmean(statistics.fmean(row[column] for row in rows) for rows in found if rows)


if __name__ == "__main__":
    main()
