"""A calibration record of one predictive, from labelled rows that the posterior was not fitted on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posterior.calibration import records
from posterior.calibration.conformal import MIN_ROWS, Conformal, Score, prediction_set
from posterior.calibration.metrics import Estimate, check, estimate
from posterior.calibration.records import Key, PredictiveName, QuestionKind, Record
from posterior.calibration.risk import Risk
from posterior.calibration.scalers import CALIBRATORS, FLOOR, Method
from posterior.data.examples import ROWS, Examples, data_hash, encode
from posterior.data.reading import Row, Rows, read, source
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.evaluation.evaluate import BATCH
from posterior.evaluation.predictions import answer_count, linearized, map_scores, sampled
from posterior.files import objects
from posterior.laplace import linearized as linear
from posterior.models import devices, lora
from posterior.models.base import Base, context, load_model, load_tokenizer, resolve
from posterior.models.devices import Dtype
from posterior.predictive.mixture import from_gaussian
from posterior.settings import Range, SettingError, Settings, setting
from posterior.storage import artefact

FOLDS = 5  # of the cross-fitting: what is printed of a row comes from a calibration that did not see it
PARTICLES = 8  # of a Laplace posterior's mixture, as `posterior serve` draws them


@dataclass(frozen=True, kw_only=True)
class Calibration(Settings):
    """Which predictive is calibrated, and how."""

    method: Method = setting(
        "temperature", "temperature: one number; vector: two an answer; platt, isotonic: of the top answer"
    )
    predictive: PredictiveName | None = setting(None, "which to calibrate (default: the served one)")
    particles: int | None = setting(
        None,
        f"of the mixture; another number is another calibration (default: {PARTICLES}, or all in the folder)",
        Range(1, 1000),
    )
    conformal: Score = setting("lac", "prediction sets: lac, the smallest on average; aps, larger where p is spread")
    coverage: float = setting(0.9, "of the sets reported here; requests may ask for any", Range(0, 1))
    batch_size: int = setting(ROWS, "rows a forward pass, at most", BATCH)
    dtype: Dtype | None = setting(
        None,
        "of the base's weights (default what `posterior serve` computes this predictive in on this machine: linearized "
        "in float32 on a CPU and bfloat16 on CUDA; mixture and map in the base's own, bfloat16 if that is float32; a "
        "record is applied to no other)",
    )
    device: str | None = setting(None, devices.HELP)

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise SettingError("{coverage} is {value}; it must lie between 0 and 1", value=self.coverage)
        super().__post_init__()
        devices.check(self.device)


def calibrate(
    posterior: artefact.Posterior, rows: Rows, *, base: str | None = None, settings: Calibration | None = None
) -> list[tuple[Record, Path]]:
    """The records, and where in the posterior's folder they were written: one, or of decisions one for each kind of
    question (`kinds`).

    Args:
        posterior: of a task with candidate answers.
        rows: at least MIN_ROWS held-out rows like the training data, or the file that has them.
        base: where the base is now; None: by the id in the posterior.
        settings: None: the defaults.

    Raises:
        PosteriorError: for whatever the user can change.
    """
    settings = settings or Calibration()
    posterior.check_open()
    data = read(rows)
    predictive, k = _check(posterior, data, settings)
    found = resolve(base or posterior.base_spec)
    posterior.check_base(found.hash)
    examples = _examples(posterior, found, data, source(rows))
    y = torch.tensor([example.label for example in examples])
    answers = posterior.task.answers
    if posterior.task.kind == "choice":
        answer_count(examples)  # the server knows a record of such rows by this number
    if answers and len(set(y.tolist())) == 1:
        raise PosteriorError(
            f"every row has the label {answers[int(y[0])]!r}; a calibration needs rows of at least two answers"
        )
    device = devices.check(settings.device)
    dtype = settings.dtype or served_dtype(predictive, found, device)
    model = lora.load_peft(load_model(found, getattr(torch, dtype), device), posterior.map_dir).eval()
    p = probabilities(model, posterior, predictive, k, examples, settings.batch_size)
    key = Key(
        base=found.hash,
        posterior=posterior.hash,
        template=records.template_hash(posterior.task),
        predictive=predictive,
        particles=k,
        dtype=dtype,
    )
    made = []
    for kind, part in kinds(posterior.task, data).items():
        counts = {len(examples[index].continuations) for index in part}
        _check_method(settings.method, counts)
        own = {"answers": max(counts)} if kind is None and not answers else {"question": kind}
        record = measure(
            p[part, : max(counts)],
            y[part],
            method=settings.method,
            score=settings.conformal,
            coverage=settings.coverage,
            key=key.model_copy(update=own),
            data=data_hash([data[index] for index in part]),
        )
        made.append(record)
    return [(record, posterior.add(record)) for record in made]


def kinds(task: Task, rows: Sequence[Row]) -> dict[QuestionKind | None, list[int]]:
    """The rows of each calibration. Of decisions: by the kind of question, where there are MIN_ROWS of it, and all rows
    together as "any", where a kind has fewer. Of another task all rows, under None."""
    if task.kind != "decision":
        return {None: list(range(len(rows)))}
    found: dict[QuestionKind | None, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(task.question_of(row).type, []).append(index)
    enough = {kind: part for kind, part in found.items() if len(part) >= MIN_ROWS}
    return enough if enough.keys() == found.keys() else enough | {"any": list(range(len(rows)))}


def _check_method(method: Method, counts: set[int]) -> None:
    """Raises PosteriorError for one that needs equally many answers in every row."""
    if len(counts) > 1 and method in ("temperature", "vector"):
        numbers = " or ".join(map(str, sorted(counts)))
        raise PosteriorError(f"the questions have {numbers} options; use the method platt or isotonic, which take both")


def _examples(posterior: artefact.Posterior, base: Base, rows: Sequence[Row], where: str) -> Examples:
    """Of the rows, none of which the posterior was fitted on."""
    longest = context(base)
    limit = f"the base's context of {longest}"
    examples = encode(posterior.task, load_tokenizer(base), rows, longest=longest, limit=limit, source=where)
    seen = posterior.trained_on(examples)
    if seen:
        raise PosteriorError(
            f"{seen} of the {len(rows)} rows are rows that {posterior.name!r} was fitted on; calibrate on others"
        )
    return examples


def served_dtype(predictive: PredictiveName, base: Base, device: str) -> Dtype:
    """What `posterior serve`, without --dtype, computes a predictive in."""
    if predictive == "linearized":
        return linear.dtype_on(device)
    config = objects.read(base.path / "config.json")
    for part in (config, config.get("text_config") or {}):
        own = part.get("dtype") or part.get("torch_dtype")
        if own in ("bfloat16", "float16"):
            return own  # type: ignore[no-any-return]
    return "bfloat16"  # vLLM halves float32


def probabilities(
    model: Any,
    posterior: artefact.Posterior,
    predictive: PredictiveName,
    k: int,
    examples: Examples,
    batch_size: int = ROWS,
) -> Tensor:
    """The predictive's probabilities [N, C], float64, as the server computes them."""
    if predictive == "linearized":
        return linearized(model, posterior.covariance, examples, batch_size).probability
    if predictive == "mixture":
        return sampled(model, posterior, k, examples, batch_size).probability
    return map_scores(model, examples, batch_size).softmax(1)


def measure(p: Tensor, y: Tensor, *, method: Method, score: Score, coverage: float, key: Key, data: str) -> Record:
    """Fit on all rows, and say by cross-fitting what it is worth. p: [N, C] float64; y: [N]."""
    check(p)
    if method == "temperature" and bool((p.argmax(1) == y).all()):
        raise PosteriorError(
            f"all {len(y)} answers are right, so that no temperature is low enough; "
            "give more rows, or use the method platt, which allows for mistakes not seen yet"
        )
    after, sets = cross_fit(p, y, method=method, score=score, coverage=coverage)
    return Record(
        key=key,
        calibrator=CALIBRATORS[method].fit(p, y),
        conformal=Conformal.fit(score, p, y),
        risk=None if method == "vector" else Risk.fit(p, y),
        n=len(y),
        data=data,
        before=_defined(estimate(p.clamp(min=FLOOR), y)),
        after=_defined(estimate(after.clamp(min=FLOOR), y)),
        coverage=coverage,
        sets={"covered": _share(sets.gather(1, y[:, None])), "size": _mean(sets.sum(1))},
    )


def cross_fit(p: Tensor, y: Tensor, *, method: Method, score: Score, coverage: float) -> tuple[Tensor, Tensor]:
    """Calibrated probabilities and prediction sets, both [N, C], each row's from the other folds' rows."""
    from sklearn.model_selection import KFold

    after, sets = torch.zeros_like(p), torch.zeros(p.shape, dtype=torch.bool)
    for others, fold in KFold(FOLDS, shuffle=True, random_state=0).split(p):
        calibrator = CALIBRATORS[method].fit(p[others], y[others])
        conformal = Conformal.fit(score, p[others], y[others])
        after[fold] = calibrator.apply(p[fold])
        sets[fold] = prediction_set(calibrator, conformal, p[fold], coverage) & (p[fold] > 0)  # 0: not an option
    return after, sets


def _check(posterior: artefact.Posterior, rows: Sequence[Row], settings: Calibration) -> tuple[PredictiveName, int]:
    """The predictive and its number of particles. Raises PosteriorError for what cannot be calibrated."""
    if not posterior.task.has_candidates:
        raise PosteriorError(f"{posterior.name!r} is a text posterior; only candidate answers are calibrated")
    if posterior.task.answers is None and settings.method == "vector":
        raise SettingError(
            "each row of {name!r} brings its own answers, but {method} vector learns a bias of each answer; use "
            "temperature, platt or isotonic",
            name=posterior.name,
        )
    if len(rows) < MIN_ROWS:
        raise PosteriorError(
            f"{len(rows)} rows are too few to calibrate on: below {MIN_ROWS}, not even the largest score bounds 95 % "
            f"of all cases with 95 % confidence (0.95^{len(rows)} = {0.95 ** len(rows):.3f} > 0.05)"
        )
    return choose(posterior, settings.predictive, settings.particles)


def choose(
    posterior: artefact.Posterior, wanted: PredictiveName | None, particles: int | None
) -> tuple[PredictiveName, int]:
    """The predictive (None: the served one) and its number of particles. Raises PosteriorError for one that the
    posterior does not have."""
    laplace = posterior.family == "laplace"
    predictive: PredictiveName = wanted or ("linearized" if laplace else "mixture")
    if predictive == "linearized" and not laplace:
        raise PosteriorError(f"{posterior.name!r} is made of particles, it has no linearized predictive; use mixture")
    if predictive != "mixture" and particles is not None:
        raise SettingError("{particles} belongs to {predictive} mixture; this is {given}", given=predictive)
    return predictive, _particles(posterior, predictive, particles)


def _particles(posterior: artefact.Posterior, predictive: PredictiveName, wanted: int | None) -> int:
    """What an answer of this predictive says as `particles`."""
    if predictive == "map":
        return 1
    if predictive == "linearized":
        return from_gaussian(torch.zeros(2), torch.zeros(2, 2)).particles
    k = (len(posterior.weights) or PARTICLES) if wanted is None else wanted
    if posterior.weights and k > len(posterior.weights):
        raise SettingError(
            "{particles} is {k}; {name!r} has {most}", k=k, name=posterior.name, most=len(posterior.weights)
        )
    return k


def _defined(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Without those that have no value on these rows, like the AUROC where every answer is right."""
    return {name: each for name, each in estimates.items() if not math.isnan(each.value)}


def _share(hits: Tensor) -> Estimate:
    """A share of rows with its exact binomial interval (Clopper & Pearson 1934)."""
    from scipy.stats import binomtest

    found = binomtest(int(hits.sum()), hits.numel())
    low, high = found.proportion_ci()
    return Estimate(float(found.statistic), float(low), float(high))


def _mean(values: Tensor) -> Estimate:
    """A mean over rows with its bootstrap interval."""
    from scipy.stats import bootstrap

    found = bootstrap((values.numpy(),), np.mean, n_resamples=1000, method="percentile", rng=0)
    low, high = found.confidence_interval
    return Estimate(float(values.double().mean()), float(low), float(high))
