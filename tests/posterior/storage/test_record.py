"""Folders of format 1, written by the code before this one: they load, and their hashes and calibrations stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from posterior.cli import inspect
from posterior.errors import PosteriorError
from posterior.models import lora
from posterior.storage import artefact, record

FORMAT_1 = Path(__file__).parents[1] / "format1"
HASHES = {
    "mood": "9411c7bd7ba438b8f07694bb3601367ade79e7fd4067d4234b3cb66b5b6b66cb",
    "gang": "1cddbd039bb796a99437cadffc30a3772111586a6e76b0bca7b1e7f28382748c",
}


@pytest.mark.parametrize("name", HASHES)
def test_format_1_loads(name: str, tmp_path: Path) -> None:
    posterior = artefact.load(FORMAT_1 / name)
    assert posterior.hash == HASHES[name], "as format 1 computed it"
    assert posterior.fit["data"]["rows"] == 60 and posterior.prior["precision"] and posterior.task.answers == ("p", "n")
    thetas = list(posterior.thetas(2))
    for theta, folder in zip(thetas, posterior.adapters(2, tmp_path), strict=True):
        assert all(torch.equal(theta[key], value) for key, value in lora.read_adapter(folder).items())
    assert inspect.describe(posterior)["family"] == posterior.family


def test_calibrations_of_format_1_match_in_their_dtype() -> None:
    posterior = artefact.load(FORMAT_1 / "mood")
    found = {(key.predictive, key.particles, key.dtype) for key in posterior.calibration}
    assert found == {("linearized", 1024, "float32"), ("mixture", 2, "float32")}
    assert all(key.posterior == posterior.hash for key in posterior.calibration)


def test_a_fit_in_the_place_of_a_format_1_folder_is_of_format_2(tmp_path: Path) -> None:
    source = artefact.load(shutil.copytree(FORMAT_1 / "gang", tmp_path / "gang"))
    theta = lora.read_adapter(source.map_dir)
    written = artefact.save(
        source.path, family="particles", base=source.base, task=source.task, prior=source.prior, fit=source.fit,
        lora_config=lora.read_config(source.map_dir), mean=theta, particles=[theta], weights=[1],
    )  # fmt: skip
    content = json.loads((source.path / "posterior.json").read_text())
    assert content["format"] == 2 and written.hash != source.hash and written.fit == source.fit
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gang"]


def test_the_hash_is_not_of_how_numbers_are_written() -> None:
    content = {
        "family": "laplace", "base": {"hash": "sha256:00", "id": "x"}, "task": {}, "weights": [], "width": 1,
        "lora": {"r": 8, "lora_alpha": 16, "use_rslora": None, "rank_pattern": None, "alpha_pattern": {}},
        "files": {"map/adapter_model.safetensors": "sha256:1", "map/adapter_config.json": "sha256:2"},
    }  # fmt: skip
    other = content | {
        "width": 1.0,
        "lora": {"r": 8, "lora_alpha": 16.0, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": None},
        "files": {
            "map/adapter_config.json": "sha256:3",
            "map/adapter_model.safetensors": "sha256:1",
            "rows.safetensors": "sha256:4",
        },
    }
    assert record._identity(content) == record._identity(other)
    assert record._identity(content) != record._identity(other | {"files": {"map/adapter_model.safetensors": "2"}})


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    """Numbers as keys become text, in another order; tuples become lists."""
    (tmp_path / "x.safetensors").write_bytes(b"")
    provenance = {"prior": {}, "fit": {"evidence_by_epochs": {8: -1.5, 16: -1.25}, "pair": (1, 2), "ratio": 0.1}}
    written = record.write(
        tmp_path, family="laplace", base={"hash": "sha256:00"}, task={"answers": ["é"]}, lora={"r": 8, "lora_alpha": 8},
        weights=[0.1, 0.9], width=0.3, provenance=provenance,
    )  # fmt: skip
    found = record.read(tmp_path)
    assert found.hash == written and found.content["fit"]["evidence_by_epochs"] == {"8": -1.5, "16": -1.25}
    assert set(found.files) == {"x.safetensors"}


def test_a_newer_format_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "posterior.json").write_text('{"format": 3, "everything": "else"}')
    with pytest.raises(PosteriorError, match="is newer than the 2 this version reads; upgrade posterior-server"):
        artefact.load(tmp_path)
