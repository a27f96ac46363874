"""A calibration record of one predictive, from labelled rows that the posterior was not fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posterior.calibration import records
from posterior.calibration.choice import Choice
from posterior.calibration.conformal import MIN_ROWS, Score
from posterior.calibration.familiarity import About, Familiarity, adapter_of
from posterior.calibration.measure import measure
from posterior.calibration.records import Key, PredictiveName, QuestionKind, Record
from posterior.calibration.scalers import CALIBRATORS, Method
from posterior.data.examples import ROWS, Examples, data_hash, encode
from posterior.data.reading import Row, Rows, read, source
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.evaluation.choosing import Predicted, compare
from posterior.evaluation.evaluate import BATCH
from posterior.evaluation.familiar import familiarity
from posterior.evaluation.predictions import answer_count, linearized, map_scores, sampled
from posterior.files import objects
from posterior.laplace import linearized as linear
from posterior.likelihood.directions import passes
from posterior.models import devices, lora
from posterior.models.base import Base, context, load_model, load_tokenizer, resolve
from posterior.models.devices import Dtype
from posterior.predictive.mixture import from_gaussian
from posterior.settings import Range, SettingError, Settings, setting
from posterior.storage import artefact

PARTICLES = 8  # of a Laplace posterior's mixture, as `posterior serve` draws them


@dataclass(frozen=True, kw_only=True)
class Calibration(Settings):
    """Which predictive is calibrated, and how."""

    method: Method | None = setting(
        None,
        "temperature: one number; vector: two an answer; platt, isotonic: of the top answer; none: as it is (default: "
        "the one of least cross-fitted NLL)",
    )
    predictive: PredictiveName | None = setting(
        None,
        "which to calibrate (default: all are compared, and the cheapest within one standard error of the least NLL is "
        "calibrated and served by default)",
    )
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


class Calibrated(NamedTuple):
    """The records, and where each was written; the choice of the predictive that is served by default, if it was left
    open; and the files that tell what questions are familiar."""

    records: list[tuple[Record, Path]]
    choice: Choice | None
    familiarity: list[Path]


def calibrate(
    posterior: artefact.Posterior, rows: Rows, *, base: str | None = None, settings: Calibration | None = None
) -> Calibrated:
    """Calibrate a predictive: the one that is named, or the one that held-out rows choose (choosing.py). There is one
    record, or of decisions one for each kind of question (`kinds`).

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
    wanted = _check(posterior, data, settings)
    found = resolve(base or posterior.base_spec)
    posterior.check_base(found.hash)
    examples = _examples(posterior, found, data, source(rows))
    y, parts = _labels(posterior, examples), kinds(posterior.task, data)
    counts = [len(example.continuations) for example in examples]
    predicted = _predict(posterior, found, wanted, examples, settings)
    methods = (settings.method,) if settings.method else methods_of(posterior.task)
    choice = None
    if len(predicted) * len(methods) > 1:
        compared = compare(predicted, y, parts, counts, methods)
        choice = Choice.of(compared, posterior=posterior.hash, n=len(y), data=data_hash(data))
    predictive, method = (choice.predictive, choice.method) if choice else (next(iter(wanted)), methods[0])
    key = Key(
        base=found.hash,
        posterior=posterior.hash,
        template=records.template_hash(posterior.task),
        predictive=predictive,
        particles=wanted[predictive],
        dtype=predicted[predictive].dtype,
    )
    made = [
        measure(
            predicted[predictive].probability[part, : max(counts[index] for index in part)],
            y[part],
            method=method,
            score=settings.conformal,
            coverage=settings.coverage,
            key=key.model_copy(update=_of_kind(posterior.task, kind, [counts[index] for index in part])),
            data=data_hash([data[index] for index in part]),
            widths=[counts[index] for index in part],
        )
        for kind, part in parts.items()
    ]
    choice = choice if settings.predictive is None else None
    familiar = _familiar(posterior, found, wanted, examples, data, settings)
    return Calibrated(
        [(each, posterior.add(each)) for each in made],
        choice and posterior.choose(choice),
        [posterior.compare_with(about, each) for about, each in familiar],
    )


def _of_kind(task: Task, kind: QuestionKind | None, widths: Sequence[int]) -> dict[str, Any]:
    """What the key of one kind of question has of its own: the kind, or how many answers the rows bring."""
    return {"answers": max(widths)} if kind is None and not task.answers else {"question": kind}


def _familiar(
    posterior: artefact.Posterior,
    base: Base,
    wanted: Iterable[PredictiveName],
    examples: Examples,
    rows: Sequence[Row],
    settings: Calibration,
) -> list[tuple[About, Familiarity]]:
    """What questions are familiar, by the adapter that the server asks with each predictive: the first particle of a
    mixture, else theta*, in the dtype of its engine."""
    device = devices.check(settings.device)
    dtype = settings.dtype or served_dtype("map", base, device)
    model = lora.load_peft(load_model(base, getattr(torch, dtype), device), posterior.map_dir).eval()
    found = []
    for adapter in dict.fromkeys(adapter_of(name) for name in wanted):
        about = About(
            base=base.hash,
            posterior=posterior.hash,
            template=records.template_hash(posterior.task),
            adapter=adapter,
            dtype=dtype,
            n=len(rows),
            data=data_hash(rows),
        )
        found.append((about, familiarity(model, posterior, adapter, examples, rows, settings.batch_size)))
    return found


def _labels(posterior: artefact.Posterior, examples: Examples) -> Tensor:
    """[N]. Raises PosteriorError for rows that cannot calibrate."""
    y, answers = torch.tensor([example.label for example in examples]), posterior.task.answers
    if posterior.task.kind == "choice":
        answer_count(examples)  # the server knows a record of such rows by this number
    if answers and len(set(y.tolist())) == 1:
        raise PosteriorError(
            f"every row has the label {answers[int(y[0])]!r}; a calibration needs rows of at least two answers"
        )
    return y


def methods_of(task: Task) -> tuple[Method, ...]:
    """The calibrators that suit the task."""
    return tuple(method for method in CALIBRATORS if method != "vector" or task.answers)


def _predict(
    posterior: artefact.Posterior,
    base: Base,
    wanted: Mapping[PredictiveName, int],
    examples: Examples,
    settings: Calibration,
) -> dict[PredictiveName, Predicted]:
    """What each predictive says of the rows, in the dtype that the server computes it in."""
    device = devices.check(settings.device)
    most = max(len(example.continuations) for example in examples)
    costs = {"map": 1, "mixture": wanted.get("mixture", 1), "linearized": 1 + passes(most)}
    found: dict[PredictiveName, Predicted] = {}
    dtypes = {name: settings.dtype or served_dtype(name, base, device) for name in wanted}
    for dtype in dict.fromkeys(dtypes.values()):
        model = lora.load_peft(load_model(base, getattr(torch, dtype), device), posterior.map_dir).eval()
        for name, k in wanted.items():
            if dtypes[name] == dtype:
                p = probabilities(model, posterior, name, k, examples, settings.batch_size)
                found[name] = Predicted(p, costs[name], dtype)
    return found


def kinds(task: Task, rows: Sequence[Row]) -> dict[QuestionKind | None, list[int]]:
    """The rows of each calibration. Of decisions: by the kind of question, where there are MIN_ROWS of it, and all rows
    together as "any", where a kind has fewer. Of another task all rows, under None."""
    if task.kind != "decision":
        return {None: list(range(len(rows)))}
    return by_kind([task.question_of(row).type for row in rows])


def by_kind(asked: Sequence[QuestionKind]) -> dict[QuestionKind | None, list[int]]:
    """The rows of each calibration of decisions, as `kinds` has them; asked: the kind of each row's question."""
    found: dict[QuestionKind | None, list[int]] = {}
    for index, kind in enumerate(asked):
        found.setdefault(kind, []).append(index)
    enough = {kind: part for kind, part in found.items() if len(part) >= MIN_ROWS}
    return enough if enough.keys() == found.keys() else enough | {"any": list(range(len(asked)))}


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


def _check(posterior: artefact.Posterior, rows: Sequence[Row], settings: Calibration) -> dict[PredictiveName, int]:
    """The predictives to compare, each with its number of particles. Raises PosteriorError for what cannot be
    calibrated."""
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
    if settings.predictive is not None:
        return dict([choose(posterior, settings.predictive, settings.particles)])
    return dict(
        choose(posterior, each, settings.particles if each == "mixture" else None) for each in posterior.predictives
    )


def choose(
    posterior: artefact.Posterior, wanted: PredictiveName | None, particles: int | None
) -> tuple[PredictiveName, int]:
    """The predictive (None: the served one) and its number of particles. Raises PosteriorError for one that the
    posterior does not have."""
    predictive = wanted or posterior.predictives[0]
    if predictive not in posterior.predictives:
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
