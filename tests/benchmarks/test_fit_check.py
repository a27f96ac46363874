"""What `make fit-check` calls the same."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.fit_check import Comparison, compare
from posterior.storage import artefact

MOOD = Path(__file__).parents[1] / "posterior" / "format1" / "mood"


@pytest.mark.parametrize(
    ("again", "relative", "holds"),
    [(10.4, False, True), (9.6, False, True), (10.6, False, False), (14.0, True, True), (16.0, True, False),
     (math.nan, False, False), (math.inf, True, False)],
)  # fmt: skip
def test_tolerances(again: float, relative: bool, holds: bool) -> None:
    one = Comparison("x", 10.0, again, 0.5, relative)
    assert one.holds == holds and f"| {'yes' if holds else 'NO'} |" in str(one)


def test_a_posterior_is_like_itself_and_unlike_a_changed_one() -> None:
    posterior = artefact.load(MOOD)
    p, y = {"mean alone": torch.tensor([[0.2, 0.8], [0.6, 0.4]]).double()}, torch.tensor([1, 0])
    assert all(each.holds and each.difference == 0 for each in compare([posterior, posterior], [p, p], y))
    changed = replace(
        posterior,
        prior={"precision": {"all": 1.1 * posterior.prior["precision"]["all"]}},
        fit=posterior.fit | {"evidence": posterior.fit["evidence"] + 6},
        width=posterior.width + 0.2,
    )
    found = compare([posterior, changed], [p, {"mean alone": p["mean alone"].flip(1)}], y)
    assert {each.name.partition(":")[0] for each in found if not each.holds} == {
        "mean alone", "prior precision, all", "log evidence, nats", "width of draws"
    }  # fmt: skip
