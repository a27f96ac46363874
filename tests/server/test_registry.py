"""Which folders are served, and which are refused with one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaConfig

from posterior.base import Base
from posterior.errors import PosteriorError
from server import registry
from tests.sealed import edit
from tests.server import folders


@pytest.fixture
def base(tmp_path: Path) -> Base:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(**sizes).save_pretrained(tmp_path / "base")
    return Base(tmp_path / "base", "tiny", None, "sha256:00")


@pytest.fixture
def root(tmp_path: Path, base: Base) -> Path:
    folders.laplace(tmp_path / "root", base)
    folders.particles(tmp_path / "root", base)
    return tmp_path / "root"


def load(root: Path, base: Base) -> registry.Registry:
    return registry.load(root, base, particles=4, cache=root.parent / "cache")


def test_names_adapters_and_weights(root: Path, base: Base) -> None:
    served = load(root, base)
    assert list(served.served) == ["tiny", "gang", "gang/map", "mood", "mood/map"]
    mood, gang = served.served["mood"], served.served["gang"]
    assert mood.weights == (0.25,) * 4 and gang.weights == (0.5, 0.3, 0.2)
    assert len({a.number for a in served.adapters}) == len({a.name for a in served.adapters}) == 4 + 3 + 2
    assert min(a.number for a in served.adapters) == 1
    assert mood.posterior is not None and mood.label == f"mood@{mood.posterior.hash[:12]}"
    assert [a.name for a in mood.particles] == [f"{mood.label}/{k:03d}" for k in range(4)]
    assert all((a.path / "adapter_model.safetensors").is_file() for a in served.adapters)
    assert set(served.public) == {"gang", "gang/map", "mood", "mood/map"}


def test_the_heaviest_particles_come_first(root: Path, base: Base) -> None:
    """A request for fewer takes those; of equal ones the first. Weights sum to one; one of weight zero comes last."""
    weights = (0.0, 0.25, 0.5, 0.25)
    folders.particles(root, base, weights)
    gang = load(root, base).served["gang"]
    assert [adapter.path.name for adapter in gang.particles] == ["002", "001", "003", "000"]
    assert [adapter.name.rpartition("/")[2] for adapter in gang.particles] == ["002", "001", "003", "000"]
    assert gang.weights == (0.5, 0.25, 0.25, 0.0)


def test_a_posterior_that_a_killed_writer_had_moved_away_is_served(root: Path, base: Base) -> None:
    (root / ".mood.posterior-work").mkdir()
    (root / "mood").rename(root / ".mood.posterior-work" / "old")
    assert "mood" in load(root, base).served and not (root / ".mood.posterior-work").exists()


def test_what_a_killed_writer_left_is_not_served(root: Path, base: Base) -> None:
    shutil.copytree(root / "mood", root / ".mood.posterior-work" / "new")
    assert list(load(root, base).served) == ["tiny", "gang", "gang/map", "mood", "mood/map"]


def test_new_weights_get_new_names(root: Path, base: Base) -> None:
    """vLLM keys its prefix cache by the adapter's name: other weights under the same name would serve stale states."""
    before = {a.name for a in load(root, base).adapters if a.name.startswith("mood")}
    folders.laplace(root, base, precision=77.0)
    assert before.isdisjoint(a.name for a in load(root, base).adapters)


def refused(root: Path, base: Base, words: str) -> None:
    with pytest.raises(PosteriorError, match=words) as caught:
        load(root, base)
    assert "\n" not in str(caught.value)


def test_another_base_is_refused(root: Path, base: Base) -> None:
    refused(root, Base(base.path, base.id, None, "sha256:11"), "was fitted on")


def test_damage_is_refused(root: Path, base: Base) -> None:
    weights = root / "mood" / "map" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(root, base, "sha256 differs")
    (root / "mood" / "posterior.json").write_text("{")
    refused(root, base, "not JSON")


def test_files_outside_the_folder_are_refused(root: Path, base: Base) -> None:
    files = json.loads((root / "mood" / "posterior.json").read_text())["files"]
    edit(root / "mood", files=files | {"../../secret": "sha256:00"})
    refused(root, base, "outside the folder")


def test_folders_outside_the_root_are_refused(root: Path, base: Base, tmp_path: Path) -> None:
    shutil.move(root / "mood", tmp_path / "elsewhere")
    (root / "mood").symlink_to(tmp_path / "elsewhere")
    refused(root, base, "lies outside")


def test_names_that_cannot_be_models_are_refused(root: Path, base: Base) -> None:
    (root / "mood").rename(root / "my mood")
    refused(root, base, "cannot be a model name")
    (root / "my mood").rename(root / "tiny")
    refused(root, base, "two models would be named")


def test_nothing_to_serve(base: Base, tmp_path: Path) -> None:
    refused(tmp_path / "absent", base, "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", base, "posterior fit")
