"""The MAP beside the posterior on test rows: how often right, how calibrated, and what is not known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posterior.calibration.conformal import sets
from posterior.calibration.metrics import estimate, ood_auroc
from posterior.calibration.risk import Held, Risk
from posterior.calibration.scalers import Temperature
from posterior.data.examples import ROWS, Examples, data_hash, encode
from posterior.data.reading import Rows, read, source
from posterior.data.task import Task
from posterior.errors import PosteriorError, warn
from posterior.evaluation.predictions import Predictions, predictives
from posterior.evaluation.report import ENTROPIES, Report, Source
from posterior.models import devices, lora
from posterior.models.base import Base, context, load_model, load_tokenizer, resolve
from posterior.models.devices import Dtype
from posterior.settings import Range, SettingError, Settings, setting
from posterior.storage.artefact import Posterior

BATCH = Range(1, 2**16)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Settings):
    """How a posterior is run over test rows."""

    particles: int = setting(8, "of the sampled predictive, or all in the folder if it has fewer", Range(1, 1000))
    batch_size: int = setting(ROWS, "rows a forward pass, at most", BATCH)
    max_risk: float = setting(
        0.05, "share of wrong answers that is allowed among those given: which confidence it takes", Range(0, 1)
    )
    dtype: Dtype = setting("float32", "of the base's weights")
    device: str | None = setting(None, devices.HELP)

    def __post_init__(self) -> None:
        if not 0 < self.max_risk < 1:
            raise SettingError("{max_risk} is {value}; it must lie between 0 and 1", value=self.max_risk)
        super().__post_init__()
        devices.check(self.device)


def evaluate(
    posterior: Posterior,
    rows: Rows,
    *,
    calibration: Rows | None = None,
    ood: Rows | None = None,
    base: str | None = None,
    settings: Evaluation | None = None,
) -> Report:
    """What is known of the posterior on these rows.

    Args:
        posterior: of a choice task.
        rows: labelled rows that it was not fitted on, or the file that has them.
        calibration: held-out rows for prediction sets, for the confidence that `max_risk` takes, and for a temperature
            of the MAP, shown as a baseline.
        ood: rows of another kind (labels are not read): does entropy tell them from the others?
        base: where the base is now; None: by the id in the posterior.
        settings: None: the defaults.

    Raises:
        PosteriorError: for whatever the user can change.
    """
    settings = settings or Evaluation()
    if not posterior.task.has_candidates:
        raise PosteriorError(f"{posterior.name!r} is a text posterior; evaluate compares candidate answers")
    found = resolve(base or posterior.base_spec)
    posterior.check_base(found.hash)
    read_rows = partial(TestRows.read, posterior.task, load_tokenizer(found), context(found))
    test = read_rows(rows)
    held = None if calibration is None else read_rows(calibration)
    other = None if ood is None else read_rows(ood, labels=False)
    again = test.repeated(held) if held else 0
    _warn(posterior, test, again)
    predict = partial(
        predictives, _model(posterior, found, settings), posterior, settings.particles, settings.batch_size
    )
    at_held = predict(held.examples) if held else {}
    temperature = Temperature.fit(at_held["MAP"].probability, held.y).temperature if held else None
    at_test = predict(test.examples, temperature)
    at_ood = predict(other.examples, temperature) if other else {}
    return Report(
        posterior={"name": posterior.name, "hash": posterior.hash, "family": posterior.family},
        base=posterior.base,
        data=test.source,
        calibration=held.source if held else None,
        repeated=again,
        ood=other.source if other else None,
        table={name: estimate(each.probability, test.y) for name, each in at_test.items()},
        sets=_sets(at_held, held, at_test, test),
        held=_held(settings.max_risk, at_held, held, at_test, test),
        ood_auroc={
            name: {kind: ood_auroc(getattr(at_test[name], kind), getattr(each, kind)) for kind in ENTROPIES}
            for name, each in at_ood.items()
        },
        curves={name: (each.probability, test.y) for name, each in at_test.items()},
        fit=posterior.fit,
    )


def _model(posterior: Posterior, base: Base, settings: Evaluation) -> Any:
    model = load_model(base, getattr(torch, settings.dtype), devices.check(settings.device))
    return lora.load_peft(model, posterior.map_dir).eval()


def _warn(posterior: Posterior, test: TestRows, again: int) -> None:
    """Of test rows that are too easy."""
    if again:
        warn(f"{again} of {len(test.y)} test rows are calibration rows too, where temperature and sets look too good")
    seen = posterior.trained_on(test.examples)
    if seen:
        warn(f"{seen} of {len(test.y)} test rows are rows that {posterior.name!r} was fitted on; others are harder")


def _sets(
    at_held: Mapping[str, Predictions], held: TestRows | None, at_test: Mapping[str, Predictions], test: TestRows
) -> dict[str, tuple[float, float]]:
    """(share covered, mean size) of each predictive's prediction sets."""
    if held is None:
        return {}
    return {name: sets(each.probability, held.y, at_test[name].probability, test.y) for name, each in at_held.items()}


def _held(
    allowed: float,
    at_held: Mapping[str, Predictions],
    held: TestRows | None,
    at_test: Mapping[str, Predictions],
    test: TestRows,
) -> dict[str, Held]:
    """What the allowed error comes to under each predictive."""
    if held is None:
        return {}
    return {
        name: Held.of(Risk.fit(each.probability, held.y), allowed, at_test[name].probability, test.y)
        for name, each in at_held.items()
    }


@dataclass(frozen=True)
class TestRows:
    """A file of rows: where they are from, as examples, and their labels [N]."""

    source: Source
    examples: Examples
    y: Tensor

    @classmethod
    def read(cls, task: Task, tokenizer: Any, longest: int, data: Rows, labels: bool = True) -> TestRows:
        """Of rows, or of the file that has them, each of at most `longest` tokens, the base's context. Raises
        PosteriorError."""
        rows = read(data)
        asked = rows if labels else [{**row, "label": 0} for row in rows]
        limit = f"the base's context of {longest}"
        examples = encode(task, tokenizer, asked, longest=longest, limit=limit, source=source(data))
        y = torch.tensor([example.label for example in examples])
        return cls(Source(Path(str(source(data) or "rows")).name, data_hash(rows), len(rows)), examples, y)

    def repeated(self, others: TestRows) -> int:
        """How many of these are in `others` too: the same prompt with the same answers."""
        known = {(example.prompt, example.continuations) for example in others.examples}
        return sum((example.prompt, example.continuations) in known for example in self.examples)
