"""The other libraries of benchmarks/rivals.py are used rightly."""

from __future__ import annotations

import pytest

from benchmarks import rivals
from tests.benchmarks.test_rivals import distances


@pytest.mark.filterwarnings("ignore")  # of the libraries and their back ends
@pytest.mark.parametrize("name", ["laplace-torch", "bayesian-lora"])
def test_each_is_nearer_to_the_dense_answer_than_the_prior_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "KFAC_RANK", 4)
    monkeypatch.setattr(rivals, "WIDE", 5)
    found, prior = distances(name)
    assert found < prior
