"""LM-Polygraph's estimators (Fadeeva et al. 2023, arXiv 2311.07383) on the same samples as ours.

`make oracles` runs this folder. Only the files of the estimators are loaded: the package itself asks for much that it
does not need here.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from posterior.calibration.rightness import features
from posterior.meaning.exact import exact
from posterior.predictive.decoding import text_predictive
from posterior.predictive.meanings import meanings

TEXTS = ["Paris", "London", "the paris.", "Rome", "London!", "PARIS", "Oslo", "Paris"]


@pytest.fixture(scope="module")
def estimators() -> Any:
    """The estimators by name."""
    found = importlib.util.find_spec("lm_polygraph")
    assert found is not None and found.origin is not None
    root = Path(found.origin).parent
    for name, place in (("lm_polygraph", root), ("lm_polygraph.estimators", root / "estimators")):
        package = ModuleType(name)  # without what its __init__.py imports
        package.__path__ = [str(place)]
        sys.modules[name] = package
    utils = ModuleType("lm_polygraph.utils.common")
    vars(utils)["polygraph_module_init"] = lambda function: function
    sys.modules["lm_polygraph.utils"] = ModuleType("lm_polygraph.utils")
    sys.modules["lm_polygraph.utils.common"] = utils
    names = {
        "semantic_entropy": "SemanticEntropy",
        "perplexity": "Perplexity",
        "max_probability": "MaximumSequenceProbability",
        "token_entropy": "MeanTokenEntropy",
    }
    return {cls: getattr(importlib.import_module(f"lm_polygraph.estimators.{f}"), cls) for f, cls in names.items()}


def test_semantic_entropy_of_one_adapter(estimators: Any) -> None:
    """Theirs by frequency is the entropy of our shares: the estimate without bias in each meaning's probability."""
    groups = exact(TEXTS)
    found = meanings(torch.full((len(TEXTS), 1), -1.0), torch.zeros(1), groups)
    classes = [[i for i, group in enumerate(groups) if group == number] for number in range(max(groups) + 1)]
    stats = {
        "sample_texts": [TEXTS],
        "semantic_classes_entail": {"class_to_sample": [classes], "sample_to_class": [dict(enumerate(groups))]},
    }
    theirs = estimators["SemanticEntropy"](class_probability_estimation="frequency")(stats)[0]
    assert found.predictive.total == pytest.approx(theirs, abs=1e-12) and found.predictive.epistemic == 0


def test_features_of_one_adapter(estimators: Any) -> None:
    log_p = -torch.rand(5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    entropy = torch.rand(5, dtype=torch.float64)
    found = features(text_predictive(log_p, torch.zeros(1), "sequence", entropy, entropy))
    stats = {"greedy_log_likelihoods": [log_p[:, 0].numpy()], "entropy": [entropy.numpy()]}
    assert found["mean_logprob"] == pytest.approx(-estimators["Perplexity"]()(stats)[0], abs=1e-12)
    assert found["logprob"] == pytest.approx(-estimators["MaximumSequenceProbability"]()(stats)[0], abs=1e-12)
    assert found["entropy"] == pytest.approx(estimators["MeanTokenEntropy"]()(stats)[0], abs=1e-12)
    assert found["length"] == math.log(5) and found["information"] == 0 and np.isfinite(list(found.values())).all()
