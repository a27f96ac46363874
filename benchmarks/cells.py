"""One cell of the benchmark: a posterior fitted to a few rows of a set, and its predictions on rows it has not seen.

A cell is a file in benchmarks/results, named by set, rows, seed and family; its metadata hold the hash of everything
that went in, so that a cell is computed again when something did change, and only then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import smoothing
from posterior.cli import fit
from posterior.data.examples import Examples, data_hash, encode
from posterior.data.reading import Row, read_rows
from posterior.data.scoring import Scoring
from posterior.evaluation.predictions import Predictions, linearized, map_scores, point, sampled
from posterior.models import lora
from posterior.models.base import Base, load_model, load_tokenizer
from posterior.storage import artefact
from posterior.training.map import Trainer, Training

DATA, RESULTS = Path(__file__).parent / "data", Path(__file__).parent / "results"
VERSION = 2  # raised when the methods themselves change: older cells are then computed again
PARTICLES = 8
CALIBRATION, OTHER = 200, 50  # rows, at most, of the calibration split and of each other set
TEST, QUESTIONS = 396, 1000  # test rows, at most; more of questions, whose numbers are means over fewer fits
OOD = ("mmlu_cs", "mmlu_chem")

WEAK = ("--method", "ensemble", "--particles", "1", "--prior-precision", "1")
# `posterior fit`'s arguments of each family. "map" has a weak prior on B; "tfb" spreads that adapter.
FAMILIES: dict[str, tuple[str, ...]] = {
    "map": WEAK,
    "label-smoothing": WEAK,
    "map-evidence": ("--no-variational", "--structure", "full"),
    "laplace": (),
    "laplace-full": ("--structure", "full"),
    "laplace-reduce": ("--sharing", "reduce"),
    "laplace-diagonal": ("--structure", "diagonal"),
    "laplace-last-layer": ("--last-layer",),
    "dropout": ("--method", "dropout", "--dropout", "0.1"),
    "swag": ("--method", "swag"),
    "tfb": ("--method", "tfb"),
    "blob": ("--method", "blob"),
    "ivon": ("--method", "ivon"),
    "svgd": ("--method", "svgd"),
    "svgd-no-repulsion": ("--method", "svgd", "--no-repulsion"),
    "ensemble": ("--method", "ensemble"),
}
# What --epochs is multiplied by, and Adam's rate, where answers have several tokens: their scores are means, which move
# so much slower that MAP's training rows are still far from fitted after --epochs at the default rate. Laplace needs
# neither.
SLOW_EPOCHS, SLOW_RATE = 2, 3e-3
POINTS = ("map", "label-smoothing")  # one adapter, whose only predictive is its own


@dataclass(frozen=True)
class Data:
    """A set: rows to fit, to calibrate on, to test on, and those of other sets by name. answers None: each row's
    `choices`."""

    name: str
    template: str
    answers: tuple[str, ...] | None
    train: list[Row]
    calibration: list[Row]
    test: list[Row]
    others: Mapping[str, list[Row]]

    def parts(self) -> dict[str, list[Row]]:
        return {"test": self.test, "calibration": self.calibration, **self.others}


@dataclass(frozen=True)
class Result:
    """What a cell found: labels [N] and the predictions of each predictive, by part; seconds of the fit, of one epoch
    of MAP on the same rows, and of each predictive on the test rows: of the CPUs, as other cells may run beside it."""

    labels: dict[str, Tensor]
    predictions: dict[str, dict[str, Predictions]]
    seconds: dict[str, float]


def read(name: str, folder: Path | None, rows: int, test_rows: int | None = None) -> Data:
    """The set `name`; all but yelp are below `folder`. Rows that are also training rows are not tested on; at most
    `test_rows` others are, or by default TEST or QUESTIONS."""

    def part(path: str) -> list[Row]:
        if folder is None:
            raise SystemExit(f"{path} does not ship with the project; give the folder of the sets by --data")
        return read_rows(folder / path)

    if name in ("yelp", "sst2"):
        template, answers, field = "{text}\nSentiment:", (" negative", " positive"), "text"
        if name == "yelp":
            train, calibration, test = (read_rows(DATA / f"yelp.{p}.jsonl") for p in ("train", "calibration", "test"))
        else:
            train, calibration, test = (_with_text(part(f"sst2/{p}.jsonl")) for p in ("train", "dev", "test"))
        others = {} if folder is None else {f"ood {o}": _with_text(part(f"{o}/test.jsonl")) for o in OOD}
        if folder is not None:
            amazon = _with_text(part("sentiment/amazon.test.jsonl"))
            others["shift"] = amazon if name == "yelp" else read_rows(DATA / "yelp.test.jsonl")
    else:
        template, answers, field = "Question: {prompt}\nAnswer:", None, "prompt"
        train, test = (_four(part(f"{name}/{p}.jsonl")) for p in ("train", "test"))
        calibration = train[rows:]
        others = {f"ood {o}": _four(part(f"{o}/test.jsonl")) for o in OOD}
    train = train[:rows]
    known = {row[field] for row in train}
    if test_rows is None:
        test_rows = TEST if answers else QUESTIONS

    def fresh(found: list[Row], count: int) -> list[Row]:
        return [row for row in found if row[field] not in known][:count]

    others = {key: fresh(found, OTHER) for key, found in sorted(others.items())}
    return Data(name, template, answers, train, fresh(calibration, CALIBRATION), fresh(test, test_rows), others)


def _with_text(rows: list[Row]) -> list[Row]:
    """As sentences; the label of a question of another set means nothing."""
    return [{"text": row["prompt"], "label": row["label"] if row["label"] in (0, 1) else 0} for row in rows]


def _four(rows: list[Row]) -> list[Row]:
    """Those with four choices, which the answer's text continues after a space."""
    kept = [row for row in rows if len(row["choices"]) == 4]
    return [row | {"choices": [f" {choice}" for choice in row["choices"]]} for row in kept]


@dataclass(frozen=True)
class Cell:
    data: Data
    seed: int
    family: str
    epochs: int
    dtype: str

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.data.name}-{len(self.data.train)}-{self.seed}-{self.family}.safetensors"

    @property
    def training(self) -> list[str]:
        """`posterior fit`'s arguments that make it converge; none for Laplace (the default --method) where it lets the
        evidence say how long to train."""
        if self.data.answers:
            return ["--epochs", str(self.epochs)]
        if "--method" not in FAMILIES[self.family]:
            return []
        return ["--epochs", str(SLOW_EPOCHS * self.epochs), "--learning-rate", str(SLOW_RATE)]

    def key(self, base: Base) -> str:
        """sha256 of all that the predictions depend on."""
        parts = {name: data_hash(rows) for name, rows in self.data.parts().items()}
        inputs = [VERSION, base.hash, self.data.template, self.data.answers, data_hash(self.data.train), parts]
        inputs += [self.seed, self.epochs, FAMILIES[self.family], PARTICLES, self.dtype]
        inputs += [] if self.data.answers else [Scoring().tokens, self.training]  # of several tokens
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def known(self, base: Base) -> Result | None:
        """What was found before from the same inputs."""
        if not self.path.is_file():
            return None
        with safe_open(self.path, framework="pt") as file:
            meta = json.loads(file.metadata()["cell"])
            if meta["key"] != self.key(base):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        predictions: dict[str, dict[str, Predictions]] = {}
        labels = {name.removesuffix("/label"): value for name, value in tensors.items() if name.endswith("/label")}
        for part in labels:
            names = {name.split("/")[1] for name in tensors if name.startswith(f"{part}/") and name.count("/") == 2}
            predictions[part] = {
                name: Predictions(
                    *(tensors[f"{part}/{name}/{field}"].double() for field in ("probability", "epistemic", "total"))
                )
                for name in names
            }
        return Result(labels, predictions, meta["seconds"])

    def run(self, base: Base, work: Path) -> Result:
        """Fit (into `work`, unless it is there) and predict; leaves the file that `known` reads."""
        posterior, fitting = self.fit(work)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer: Any = load_tokenizer(base)
        model: Any = lora.load_peft(load_model(base, getattr(torch, self.dtype), device), posterior.map_dir)
        examples = {name: encode(posterior.task, tokenizer, rows) for name, rows in self.data.parts().items() if rows}
        seconds = {"fit": fitting, "epoch": _epoch(model, encode(posterior.task, tokenizer, self.data.train))}
        model.eval().requires_grad_(False)
        predictions: dict[str, dict[str, Predictions]] = {}
        for part, rows in examples.items():
            predictions[part] = {}
            for name, predict in self._predictives(model, posterior).items():
                start = time.process_time()
                predictions[part][name] = predict(rows)
                if part == "test":
                    seconds[name] = time.process_time() - start
        labels = {part: torch.tensor([row.label for row in rows]) for part, rows in examples.items()}
        self._save(Result(labels, predictions, seconds), self.key(base))
        found = self.known(base)
        assert found is not None
        return found

    def _predictives(self, model: Any, posterior: artefact.Posterior) -> dict[str, Callable[[Examples], Predictions]]:
        found: dict[str, Callable[[Examples], Predictions]] = {
            "MAP": lambda rows: point(map_scores(model, rows)),
        }
        if posterior.family == "laplace":
            found["linearized"] = lambda rows: linearized(model, posterior.covariance, rows)
        if (posterior.family == "particles" and self.family not in POINTS) or self.family == "laplace":
            found["particles"] = lambda rows: sampled(model, posterior, PARTICLES, rows)
        return found

    def fit(self, work: Path) -> tuple[artefact.Posterior, float]:
        """The posterior, and the seconds that its fit took (TFB's include those of the adapter it spreads)."""
        folder = work / self.path.stem
        adapter, before = [], 0.0
        if self.family == "tfb":
            trained = Cell(self.data, self.seed, "map", self.epochs, self.dtype)
            posterior, before = trained.fit(work)
            adapter = ["--adapter", str(posterior.map_dir)]
        spent = work / f"{folder.name}.seconds"  # written last
        if not spent.is_file():
            work.mkdir(parents=True, exist_ok=True)
            rows = work / f"{self.path.stem}.jsonl"
            rows.write_text("".join(json.dumps(row) + "\n" for row in self.data.train), encoding="utf-8")
            words = [str(rows), "--out", str(folder), "--template", self.data.template, *FAMILIES[self.family]]
            words += ["--dtype", self.dtype]
            words += ["--answers", *self.data.answers] if self.data.answers else []
            training = self.training if self.family != "tfb" else []
            parser = argparse.ArgumentParser()
            fit.add_arguments(parser)
            start = time.process_time()
            method = smoothing.fit if self.family == "label-smoothing" else fit.call
            method(parser.parse_args([*words, *adapter, *training, "--seed", str(self.seed)]))
            spent.write_text(str(time.process_time() - start))
        return artefact.load(folder), before + float(spent.read_text())

    def _save(self, result: Result, key: str) -> None:
        tensors = {f"{part}/label": value for part, value in result.labels.items()}
        for part, found in result.predictions.items():
            for name, each in found.items():
                tensors |= {f"{part}/{name}/{field}": value.float() for field, value in vars(each).items()}
        self.path.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as scratch:
            meta = {"key": key, "seconds": {name: round(value, 3) for name, value in result.seconds.items()}}
            save_file(tensors, Path(scratch) / "cell", metadata={"cell": json.dumps(meta)})
            (Path(scratch) / "cell").chmod(0o644)
            (Path(scratch) / "cell").rename(self.path)


def _epoch(model: Any, examples: Examples) -> float:
    """Seconds of one epoch of MAP training: the unit of cost. Learning at 1e-12, it leaves the adapter as it is."""
    trainer = Trainer(model, examples, dict.fromkeys(lora.matrices(model), 1.0), Training(1e-12, epochs=1))
    start = time.process_time()
    trainer.run_epoch()
    return time.process_time() - start
