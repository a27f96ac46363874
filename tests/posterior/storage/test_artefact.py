"""The posterior folder: what is written is read back, and every mismatch is one clear sentence."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from posterior.errors import PosteriorError
from posterior.laplace import blockwise
from posterior.models import lora
from posterior.storage import artefact
from tests.sealed import edit, rehash


def test_round_trip(folder):
    posterior = artefact.load(folder)
    assert posterior.family == "laplace" and posterior.name == "tiny"
    assert posterior.task.answers == ("n", "p")
    assert set(posterior.curvature) == set(posterior.precision) == set(lora.read_adapter(posterior.map_dir))
    assert json.loads((folder / "map" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt")) and not list(folder.rglob("*.pkl"))


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"provenance": {"prior": {"choice": "another"}, "fit": {"seconds": 1e9}}}, True),
        ({"base": {"id": "moved", "revision": "2", "hash": "BASE"}}, True),
        ({"base": {"id": "tiny-llama", "revision": None, "hash": "sha256:00"}}, False),
        ({"task": {"kind": "choice", "template": "{text}?", "answers": ["n", "p"], "scores": "mean"}}, False),
        ({"task": {"kind": "choice", "template": "{text}:", "answers": ["p", "n"], "scores": "mean"}}, False),
        ({"width": 0.5}, False),
        ({"lora": {"lora_alpha": 8}}, False),
        ({"lora": {"use_rslora": True}}, False),
        ({"lora": {"alpha_pattern": {"q_proj": 8}}}, False),
        ({"lora": {"lora_dropout": 0.5, "target_modules": ["v_proj", "q_proj"]}}, True),
    ],
)
def test_hash_names_the_distribution_and_nothing_else(folder, changes, same):
    before = artefact.load(folder)
    content = json.loads((folder / "posterior.json").read_text())
    if "lora" in changes:
        changes = {"lora": content["lora"] | changes["lora"]}
    if changes.get("base", {}).get("hash") == "BASE":
        changes = {"base": changes["base"] | {"hash": content["base"]["hash"]}}
    edit(folder, **changes)
    assert (artefact.load(folder).hash == before.hash) == same


@pytest.mark.parametrize("name", ["map/adapter_model.safetensors", "laplace.safetensors"])
def test_hash_covers_the_tensors(folder, name):
    before = artefact.load(folder).hash
    tensors = load_file(folder / name)
    key = next(key for key in tensors if key.endswith(("/precision", "weight")))
    save_file(tensors | {key: tensors[key] * 1.5}, folder / name)
    rehash(folder)
    assert artefact.load(folder).hash != before


def test_two_equal_fits_have_one_hash(run_fit, tmp_path):
    """Their seconds, places and names differ, and so do their records."""
    first, second, other = run_fit(tmp_path / "a"), run_fit(tmp_path / "b"), run_fit(tmp_path / "c", seed=1)
    assert first.hash == second.hash != other.hash
    assert first.fit["seconds"] > 0 and first.prior["choice"] == "evidence"


def test_a_record_that_was_changed_is_refused(folder):
    path = folder / "posterior.json"
    path.write_text(path.read_text().replace('"choice": "evidence"', '"choice": "fixed"'))
    with pytest.raises(PosteriorError, match="was changed after the fit"):
        artefact.load(folder)


def test_laplace_particles_are_peft_folders_drawn_once(folder, tmp_path):
    posterior = artefact.load(folder)
    first = posterior.adapters(3, tmp_path / "cache")
    stamp = (first[0] / "adapter_model.safetensors").stat().st_mtime_ns
    assert posterior.adapters(3, tmp_path / "cache") == first
    assert (first[0] / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    generator = torch.Generator().manual_seed(0)
    mean = lora.read_adapter(posterior.map_dir)
    for path in first:
        expected = blockwise.sample(posterior.curvature, posterior.precision, mean, generator, posterior.width)
        found = lora.read_adapter(path)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_draws_have_the_width_of_the_folder(folder, tmp_path):
    """theta* + w (draw of width 1 - theta*); a folder of width 1 draws as wide as the Gaussian."""
    narrow = artefact.load(folder)
    assert 0 < narrow.width < 1
    mean = lora.read_adapter(narrow.map_dir)
    (drawn,) = map(lora.read_adapter, narrow.adapters(1, tmp_path))
    edit(folder, width=1.0)
    whole = artefact.load(folder)
    assert whole.width == 1 and whole.hash != narrow.hash
    for name, value in lora.read_adapter(*whole.adapters(1, tmp_path)).items():
        torch.testing.assert_close(drawn[name], mean[name] + narrow.width * (value - mean[name]))


def test_particles_family(folder, tmp_path):
    source = artefact.load(folder)
    mean = lora.read_adapter(source.map_dir)
    common = {
        "base": source.base,
        "task": source.task,
        "lora_config": lora.read_config(source.map_dir),
        "prior": {},
        "fit": {},
    }
    made = artefact.save(
        tmp_path / "p", family="particles", mean=mean, particles=[mean, mean], weights=[0.25, 0.75], **common
    )
    assert made.weights == (0.25, 0.75)
    assert [path.name for path in made.adapters(2, tmp_path)] == ["001", "000"], "the heaviest first"
    assert made.mixture(2) == (0.75, 0.25) and made.mixture(1) == (1.0,)
    with pytest.raises(PosteriorError, match="has 2 particles, 3 were asked for"):
        made.adapters(3, tmp_path)
    with pytest.raises(PosteriorError, match="sum to 1"):
        artefact.save(tmp_path / "q", family="particles", mean=mean, particles=[mean], weights=[0.5], **common)


def test_of_two_particles_one_without_weight(folder, tmp_path):
    """One particle is the second, not 0 / 0."""
    source = artefact.load(folder)
    thetas = [{name: value + step for name, value in lora.read_adapter(source.map_dir).items()} for step in (0.0, 1.0)]
    made = artefact.save(
        tmp_path / "p", family="particles", base=source.base, task=source.task, prior={}, fit={}, mean=thetas[0],
        lora_config=lora.read_config(source.map_dir), particles=thetas, weights=[0, 1],
    )  # fmt: skip
    (only,) = made.thetas(1)
    assert all(torch.equal(only[name], value) for name, value in thetas[1].items())
    assert made.mixture(1) == (1.0,) and made.mixture(2) == (1.0, 0.0) and made.order(2) == [1, 0]


def test_another_base_is_refused(folder):
    posterior = artefact.load(folder)
    posterior.check_base(posterior.base["hash"])
    with pytest.raises(PosteriorError, match="was fitted on tiny-llama"):
        posterior.check_base("sha256:" + "0" * 64)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "posterior.json").unlink(), "no posterior folder"),
        (lambda f: (f / "posterior.json").write_text("{"), "not a JSON object"),
        (lambda f: (f / "posterior.json").write_text("[" * 100_000), "not a JSON object"),
        (lambda f: (f / "posterior.json").write_text(r'{"format": 2, "a": "\ud83d"}'), "not a JSON object"),
        (lambda f: (f / "posterior.json").write_text("[]"), "not a JSON object"),
        (lambda f: edit(f, format=3), "format 3, which is newer than the 2 this version reads; upgrade"),
        (lambda f: edit(f, format="2"), "format '2'; this version reads 1 and 2"),
        (lambda f: edit(f, provenance=None), "damaged"),
        (lambda f: edit(f, lora={}), "damaged"),
        (lambda f: edit(f, family="flow"), "family 'flow'"),
        (lambda f: edit(f, width=0.0), "width 0.0; it must be in"),
        (lambda f: edit(f, width=float("nan")), "width nan; it must be in"),
        (lambda f: edit(f, width=[1]), "damaged"),
        (lambda f: edit(f, task=None), "damaged"),
        (lambda f: edit(f, files={}), "does not list map/adapter_config.json"),
        (lambda f: edit(f, files={"../evil": "sha256:0"}), "outside the folder"),
        (lambda f: edit(f, files={"/etc/passwd": "sha256:0"}), "outside the folder"),
        (lambda f: shutil.rmtree(f / "map"), "is missing"),
        (lambda f: (f / "laplace.safetensors").write_bytes(b"x"), "sha256 differs"),
    ],
)
def test_damage_is_named(folder, damage, match):
    damage(folder)
    with pytest.raises(PosteriorError, match=match) as error:
        artefact.load(folder)
    assert "\n" not in str(error.value)


def test_a_symbolic_link_out_of_the_folder_is_refused(folder, tmp_path):
    target = tmp_path / "elsewhere.safetensors"
    shutil.move(folder / "laplace.safetensors", target)
    (folder / "laplace.safetensors").symlink_to(target)
    with pytest.raises(PosteriorError, match="outside the folder"):
        artefact.load(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda key, value: value * float("nan") if key.endswith("A/large.values") else value, "not finite"),
        (lambda key, value: value[:-1] if key.endswith("B/small.basis") else value, "shape"),
        (lambda key, value: -value if key.endswith("/precision") else value, "must be positive"),
    ],
)
def test_damaged_tensors_are_named(folder, change, match):
    path = folder / "laplace.safetensors"
    save_file({key: change(key, value).contiguous() for key, value in load_file(path).items()}, path)
    rehash(folder)
    with pytest.raises(PosteriorError, match=match):
        artefact.load(folder)


def test_an_adapter_of_another_kind_is_refused(folder):
    path = folder / "map" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "LOHA"}))
    with pytest.raises(PosteriorError, match="only LORA"):
        lora.read_config(folder / "map")


def test_a_full_disk_leaves_the_old_folder_and_no_rubbish(run_fit, folder, tmp_path, monkeypatch):
    before = artefact.load(folder).hash

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artefact, "save_file", full)
    with pytest.raises(PosteriorError, match="is full"):
        run_fit(folder, seed=5)
    assert artefact.load(folder).hash == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "data.jsonl") == [".tiny.checkpoint", "tiny"]
