"""Every family that `posterior fit` knows, fitted for a moment on the first layers of the real base and served by one
real server: its answers are those of transformers + peft in this process."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from posterior import fitting
from posterior.cli import fit
from posterior.data.examples import encode
from posterior.evaluation.predictions import linearized, sampled
from posterior.laplace import width
from posterior.models import lora
from posterior.models.base import Base, load_model, load_tokenizer
from posterior.storage import artefact
from tests.server import folders
from tests.server.running import KEY, launched

K = 2
ROWS = [{"text": f"It was {word}.", "label": i % 2} for i, word in enumerate(["bad", "good", "dull", "fun"])]
INPUTS = [{"text": "A lovely evening."}, {"text": "Never again."}]
PARTICLES = ("--particles", str(K))
FAMILIES: dict[str, tuple[str, ...]] = {
    "laplace": ("--epochs", "2"),  # turns of curvature and mean
    "full": ("--structure", "full"),
    "reduce": ("--sharing", "reduce"),
    "diagonal": ("--structure", "diagonal"),
    "last-layer": ("--last-layer",),
    "rslora": ("--rslora", "--no-variational"),
    "ensemble": ("--method", "ensemble", *PARTICLES),
    "pissa": ("--method", "ensemble", "--init", "pissa", *PARTICLES),
    "dropout": ("--method", "dropout", "--dropout", "0.1", *PARTICLES),
    "swag": ("--method", "swag", "--epochs", "2", *PARTICLES),  # moments of several epochs
    "blob": ("--method", "blob", *PARTICLES),
    "ivon": ("--method", "ivon", *PARTICLES),
    "svgd": ("--method", "svgd", *PARTICLES),
    "tfb": ("--method", "tfb", *PARTICLES),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return folders.cut_base(tmp_path_factory.mktemp("cut"))


@pytest.fixture(scope="module")
def fitted(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose posteriors/ has one of each family."""
    root = tmp_path_factory.mktemp("families")
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = ("--template", folders.TASK.template, "--answers", *(folders.TASK.answers or ()), "--base", str(base.path))
    training = ("--epochs", "1", "--batch-size", "2", "--learning-rate", "0.003")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(width, "DRAWS", 1)  # any width will do, and eight draws' one takes as long as all the rest
        patch.setattr(width, "TOLERANCE", 0.5)
        patch.setattr(fitting, "load_tokenizer", functools.cache(load_tokenizer))  # half a second each time
        for name, options in FAMILIES.items():
            given = ("--adapter", str(root / "posteriors" / "laplace" / "map")) if name == "tfb" else training
            parser = argparse.ArgumentParser()
            fit.add_arguments(parser)
            words = (str(rows), "--out", str(root / "posteriors" / name), *task, *given, *options)
            fit.call(parser.parse_args(words))
    return root


@pytest.fixture(scope="module")
def url(base: Base, fitted: Path) -> Iterator[str]:
    options = ("--dtype", "float32", "--particles", str(K), "--max-model-len", "256")
    with launched(fitted, base, *options) as (url, _):
        yield url


@pytest.fixture(scope="module")
def tokenizer(base: Base) -> Any:
    return load_tokenizer(base)


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_served_answers_are_those_of_the_fitted_posterior(
    base: Base, tokenizer: Any, fitted: Path, url: str, name: str
) -> None:
    posterior = artefact.load(fitted / "posteriors" / name)
    rows = encode(posterior.task, tokenizer, [row | {"label": 0} for row in INPUTS])
    model: Any = lora.load_peft(load_model(base, torch.float32, "cpu"), posterior.map_dir).eval()
    expected = {"mixture": sampled(model, posterior, K, rows)}
    if posterior.family == "laplace":
        expected["linearized"] = linearized(model, posterior.covariance, rows)
    for predictive, ours in expected.items():
        body = {"model": name, "inputs": INPUTS, "predictive": predictive}
        key = {"Authorization": f"Bearer {KEY}"}
        response = httpx.post(f"{url}/v1/predictive", json=body, headers=key, timeout=120)
        assert response.status_code == 200, response.text
        data = response.json()["data"]
        served = torch.tensor([[a["probability"] for a in item["answers"]] for item in data], dtype=torch.float64)
        assert torch.allclose(served, ours.probability, atol=1e-3), (predictive, served, ours.probability)
        epistemic = torch.tensor([item["entropy"]["epistemic"] for item in data], dtype=torch.float64)
        assert torch.allclose(epistemic, ours.epistemic, atol=1e-3) and bool((epistemic > 0).all())
