"""Which folders are served, and which are left out with one clear line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from posterior.errors import PosteriorError
from posterior.models.base import Base
from server.metrics import Metrics
from server.services import registry
from tests.sealed import edit, rehash
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
    hashes = [each.posterior.hash[:12] for each in (gang, mood) if each.posterior is not None]
    assert set(served.public) == {
        f"{name}{end}@{hash}" for name, hash in zip(("gang", "mood"), hashes, strict=True) for end in ("", "/map")
    }


def test_without_the_linearised_predictive_the_mixture_takes_its_place(root: Path, base: Base) -> None:
    mood = load(root, base).served["mood"]
    assert mood.predictives == ("linearized", "mixture", "map") and set(load(root, base).laplace) == {mood.label}
    served = registry.Source(root, base, 4, root.parent / "cache", linearized=False).all()
    assert served.served["mood"].predictives == ("mixture", "map") and not served.laplace
    assert served.served["mood"].weights == mood.weights


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


def refused(root: Path, base: Base, name: str, words: str) -> None:
    """The folder `name` is left out with one line, and "gang" is served all the same."""
    served = load(root, base)
    assert list(served.served) == ["tiny", "gang", "gang/map"] and list(served.refused) == [name]
    assert re.search(words, served.refused[name]) and "\n" not in served.refused[name]
    numbers = [adapter.number for adapter in served.adapters]
    assert len(set(numbers)) == len(numbers) and min(numbers) >= 1


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def rewrite_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    record = json.loads((folder / "posterior.json").read_text())
    change(record)
    edit(folder, **record)


def test_another_base_is_refused(root: Path, base: Base) -> None:
    rewrite_record(root / "mood", lambda record: record["base"].update(hash="sha256:11"))
    refused(root, base, "mood", "was fitted on")


def test_damage_is_refused(root: Path, base: Base) -> None:
    weights = root / "mood" / "map" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(root, base, "mood", "sha256 differs")
    (root / "mood" / "posterior.json").write_text("{")
    refused(root, base, "mood", "not a JSON object")


def test_another_format_is_refused(root: Path, base: Base) -> None:
    rewrite_record(root / "mood", lambda record: record.update(format=99))
    refused(root, base, "mood", "format 99")


@pytest.mark.parametrize(
    ("setting", "words"),
    [({"use_dora": True}, "has use_dora set"), ({"r": 1024}, "has rank 1024; vLLM serves up to 512")],
)
def test_an_adapter_that_vllm_would_refuse(root: Path, base: Base, setting: dict[str, Any], words: str) -> None:
    rewrite(root / "mood" / "map" / "adapter_config.json", lambda config: config.update(setting))
    rehash(root / "mood")
    refused(root, base, "mood", words)


def test_adapters_of_the_vocabulary_are_refused(root: Path, base: Base) -> None:
    path = root / "mood" / "map" / "adapter_model.safetensors"
    tensors = {name.replace("model.layers.0.self_attn.q_proj", "lm_head"): v for name, v in load_file(path).items()}
    save_file(tensors, path)
    path = root / "mood" / "laplace.safetensors"
    save_file({k.replace("model.layers.0.self_attn.q_proj", "lm_head"): v for k, v in load_file(path).items()}, path)
    rehash(root / "mood")
    refused(root, base, "mood", "adapts lm_head; only adapters inside the layers are served")


@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", "all-linear", ".*proj"])
def test_a_pattern_of_targets_is_served_by_what_the_tensors_say(root: Path, base: Base, pattern: str) -> None:
    for part in ("map", "particles/000", "particles/001", "particles/002"):
        rewrite(root / "gang" / part / "adapter_config.json", lambda config: config.update(target_modules=pattern))
    rewrite_record(root / "gang", lambda record: record["lora"].update(target_modules=pattern))
    rehash(root / "gang")
    served = load(root, base)
    assert not served.refused and "gang" in served.served
    assert served.modules == {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}


def test_the_largest_rank_counts_those_of_patterns(root: Path, base: Base) -> None:
    assert load(root, base).rank == folders.RANK
    rewrite(root / "gang" / "map" / "adapter_config.json", lambda config: config.update(rank_pattern={"x_proj": 48}))
    rehash(root / "gang")
    assert load(root, base).rank == 48


def test_files_outside_the_folder_are_refused(root: Path, base: Base) -> None:
    files = json.loads((root / "mood" / "posterior.json").read_text())["files"]
    edit(root / "mood", files=files | {"../../secret": "sha256:00"})
    refused(root, base, "mood", "outside the folder")


def test_folders_outside_the_root_are_refused(root: Path, base: Base, tmp_path: Path) -> None:
    shutil.move(root / "mood", tmp_path / "elsewhere")
    (root / "mood").symlink_to(tmp_path / "elsewhere")
    refused(root, base, "mood", "lies outside")


def test_names_that_cannot_be_models_are_refused(root: Path, base: Base) -> None:
    (root / "mood").rename(root / "my mood")
    refused(root, base, "my mood", "cannot be a model name")
    (root / "my mood").rename(root / "tiny")
    refused(root, base, "tiny", "two models would be named")


def test_a_refused_folder_is_counted(root: Path, base: Base) -> None:
    (root / "mood" / "posterior.json").write_text("{")
    metrics = Metrics()
    load(root, base).describe(metrics)
    assert metrics.registry.get_sample_value("posterior_refused") == 1


def test_what_the_engine_refuses_is_dropped_with_its_reason(root: Path, base: Base) -> None:
    served = load(root, base)
    broken = served.served["gang"].particles[1]
    rest = served.without({broken: "rank is greater than max_lora_rank"})
    assert list(rest.served) == ["tiny", "mood", "mood/map"] and broken not in rest.adapters
    assert rest.refused["gang"].startswith("rank is greater") and str(broken.path) in rest.refused["gang"]
    rest.check(root)
    mood = served.served["mood"].map
    assert mood is not None
    with pytest.raises(PosteriorError, match="no posterior in .* can be served: gang: rank.*; mood: shape"):
        rest.without({mood: "shape"}).check(root)


def test_nothing_to_serve(root: Path, base: Base, tmp_path: Path) -> None:
    with pytest.raises(PosteriorError, match="does not exist"):
        load(tmp_path / "absent", base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PosteriorError, match="posterior fit"):
        load(tmp_path / "empty", base)
    with pytest.raises(PosteriorError, match="can be served: gang: .*was fitted on.*; mood: .*was fitted on") as caught:
        load(root, Base(base.path, base.id, None, "sha256:11"))
    assert "\n" not in str(caught.value)
