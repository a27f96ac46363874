"""Probes: what they may hold, what is compared, and the signed gap against a simulation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from posterior.calibration import probes
from posterior.calibration.probes import Probe, Probes
from posterior.calibration.records import template_hash
from posterior.data.scoring import Scoring
from posterior.data.task import Task
from posterior.errors import PosteriorError

TASK = Task("choice", "{text}:", (" no", " yes"))
ROW = Probe(row={"text": "a", "label": 1}, label=1, probability=((0.25, 0.75), (0.5, 0.5)), linearized=(0.3, 0.7))


def made(**changes: Any) -> Probes:
    values = {
        "base": "b", "posterior": "p", "template": template_hash(TASK), "dtype": "float32", "draws": None,
        "heldout": True, "rows": (ROW,),
    }  # fmt: skip
    return Probes(**{**values, **changes})


def test_they_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert probes.load(tmp_path, base="b", posterior="p", task=TASK) is None
    path = probes.save(tmp_path, made())
    assert path == tmp_path / "calibration" / "probes.json"
    assert probes.load(tmp_path, base="b", posterior="p", task=TASK) == made() and made().particles == 1


def test_those_of_another_posterior_or_changed_by_hand_are_refused(tmp_path: Path) -> None:
    path = probes.save(tmp_path, made())
    for other in ({"base": "c"}, {"posterior": "q"}, {"task": Task("choice", "{text}?", TASK.answers)}):
        known: dict[str, Any] = {"base": "b", "posterior": "p", "task": TASK, **other}
        with pytest.raises(PosteriorError, match="of another posterior"):
            probes.load(tmp_path, **known)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"heldout": False}))
    with pytest.raises(PosteriorError, match="its hash differs"):
        probes.load(tmp_path, base="b", posterior="p", task=TASK)


@pytest.mark.parametrize(
    "change",
    [
        {"probability": ((0.25, 0.75), (0.5, 0.25, 0.25))},
        {"probability": ((0.25, 0.75),)},
        {"probability": ((0.25, 1.75), (0.5, 0.5))},
        {"linearized": (1.0,)},
        {"label": 2},
    ],
)
def test_numbers_that_do_not_belong_together(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        made(rows=(ROW, Probe.model_validate({**ROW.model_dump(), **change})))


def test_what_is_compared() -> None:
    """A choice's softmax of its scores, and a text's mean probability of a token (geometric)."""
    log_p, lengths = torch.tensor([[-2.0, -3.0]]), torch.tensor([1, 3])
    found = probes.probabilities(log_p, lengths, Scoring("mean", 2.0))
    weights = [math.exp(2 * -2.0), math.exp(2 * -1.0)]
    assert found.tolist()[0] == pytest.approx([each / sum(weights) for each in weights])
    text = probes.probabilities(torch.tensor([[math.log(0.2 * 0.4 * 0.8)]]), torch.tensor([3]), Scoring("sum"))
    assert float(text) == pytest.approx((0.2 * 0.4 * 0.8) ** (1 / 3))
    assert probes.tolerance("float32", "float32") < probes.tolerance("float32", "bfloat16")


def test_the_signed_gap_of_calibrated_answers_has_mean_zero_and_variance_one() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = [0.6, 0.7, 0.8, 0.9, 0.95, 0.75, 0.65, 0.85]
    drawn = torch.rand(20_000, len(confidence), generator=generator) < torch.tensor(confidence)
    z = torch.tensor([probes.signed_gap(confidence, row)[1] for row in drawn.tolist()])
    assert abs(float(z.mean())) < 0.03 and abs(float(z.var()) - 1) < 0.05
    gap, score = probes.signed_gap([0.9, 0.9], [False, True])
    assert gap == pytest.approx(0.4) and score == pytest.approx(0.8 / math.sqrt(0.18))
