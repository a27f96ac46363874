"""Familiarity against dense linear algebra and simulation, and its file against damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.covariance import LedoitWolf
from torch import Tensor

from posterior.calibration import familiarity
from posterior.calibration.familiarity import About, Center, Familiarity, grouped
from posterior.calibration.records import template_hash
from posterior.errors import PosteriorError
from tests.posterior.calibration.made import KEY, TASK

SIZE = 24
SPREAD = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def draw(count: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated Gaussian states; a shift moves all in one direction of small variance."""
    noise = torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    least = torch.linalg.eigh(SPREAD @ SPREAD.T).eigenvectors[:, 0]
    return noise @ SPREAD.T + shift * least


@pytest.mark.parametrize("count", [12, 200], ids=["fewer rows than dimensions", "more"])
def test_the_distance_is_that_of_the_dense_shrunk_covariance(count: int) -> None:
    states, others = draw(count, 0), draw(20, 2, shift=3.0)
    dense = LedoitWolf().fit(states.numpy())
    expected = torch.from_numpy(dense.mahalanobis(others.numpy())).sqrt()
    found = Center.fit(states, torch.zeros(count, dtype=torch.long)).nearest(others)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)  # float64, the same numbers in another order


def test_beyond_its_rank_the_covariance_keeps_the_mean_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(familiarity, "RANK", 5)
    states, others = draw(200, 0), draw(20, 2)
    dense = torch.from_numpy(LedoitWolf().fit(states.numpy()).covariance_)
    values, vectors = torch.linalg.eigh(dense)
    values[:-5] = values[:-5].mean()
    centred = others - states.mean(0)
    expected = (centred @ vectors).square().div(values).sum(1).sqrt()
    found = Center.fit(states, torch.zeros(200, dtype=torch.long))
    assert found.basis.shape == (5, SIZE)
    torch.testing.assert_close(found.nearest(others)[0], expected, rtol=1e-9, atol=0)


def test_of_questions_like_the_held_out_ones_a_share_a_has_a_familiarity_of_a() -> None:
    made = Familiarity.fit(draw(400, 0), [""] * 400)
    for share in (0.05, 0.2, 0.5):
        found = torch.tensor(made(draw(4000, 3))).le(share).double().mean()
        assert abs(float(found) - share) < 0.06  # four standard errors of 400 held-out rows at .2
    strange = torch.tensor(made(draw(100, 4, shift=8.0)))
    assert float(strange.median()) <= 0.01 and min(made(1e6 * draw(2, 5))) == pytest.approx(1 / 401)


def test_each_question_has_a_mean_of_its_own() -> None:
    """What lies between two kinds of questions is strange, though no farther from the mean of all than they are."""
    apart = torch.zeros(SIZE, dtype=torch.float64)
    apart[0] = 100.0
    states = torch.cat([draw(100, 0) - apart, draw(100, 1) + apart])
    names = ["left"] * 100 + ["right"] * 100
    between = draw(50, 7)
    assert max(Familiarity.fit(states, names)(between)) < 0.01
    assert torch.tensor(Familiarity.fit(states, ["one"] * 200)(between)).median() > 0.2


def test_a_question_is_compared_with_rows_that_were_asked_the_same() -> None:
    """One question's states lie ten times as far apart as the other's: of each a share .5 has .5 or less."""
    apart = torch.zeros(SIZE, dtype=torch.float64)
    apart[0] = 1000.0
    states = torch.cat([draw(200, 0), 10 * draw(200, 1) + apart])
    made = Familiarity.fit(states, ["narrow"] * 200 + ["wide"] * 200)
    for fresh in (draw(1000, 8), 10 * draw(1000, 9) + apart):
        assert abs(float(torch.tensor(made(fresh)).le(0.5).double().mean()) - 0.5) < 0.15


def test_rows_of_rare_questions_share_a_mean() -> None:
    names = ["often"] * 20 + ["a", "b", "a"]
    assert grouped(names).tolist() == [0] * 20 + [1, 1, 1]
    Familiarity.fit(draw(23, 0), names)


def test_states_of_another_model_are_refused() -> None:
    made = Familiarity.fit(draw(60, 0), [""] * 60)
    for wrong in (torch.zeros(2, SIZE + 1), torch.full((1, SIZE), torch.nan)):
        with pytest.raises(ValueError, match=f"not finite ones of {SIZE}"):
            made(wrong)


# Files

ABOUT = About(
    base=KEY.base, posterior=KEY.posterior, template=template_hash(TASK), adapter="map", dtype="bfloat16", n=60,
    data="sha256:3",
)  # fmt: skip


def made() -> Familiarity:
    return Familiarity.fit(draw(60, 0), ["a"] * 30 + ["b"] * 30)


def save(folder: Path, about: About = ABOUT) -> Path:
    folder.mkdir(exist_ok=True)
    return familiarity.save(folder, about, made())


def load(folder: Path, **changes: Any) -> dict[familiarity.Key, Familiarity]:
    return familiarity.load(folder, **{"base": KEY.base, "posterior": KEY.posterior, "task": TASK} | changes)


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path / "f")
    assert path.name == "familiarity-map-bfloat16.safetensors" and list(path.parent.iterdir()) == [path]
    (key, found), *rest = load(tmp_path / "f").items()
    assert key == ("map", "bfloat16") and not rest
    states = draw(50, 9, shift=2.0)
    # float32 in the file: a distance moves by 1e-7 of itself, past a held-out one in few of 50 x 60 comparisons
    assert torch.tensor(found(states)).sub(torch.tensor(made()(states))).abs().max() <= 1 / 61 + 1e-9


def test_a_folder_without_is_none(tmp_path: Path) -> None:
    assert load(tmp_path) == {}


@pytest.mark.parametrize("change", [{"posterior": "other"}, {"base": "other"}, {"task": None}])
def test_of_another_posterior(tmp_path: Path, change: dict[str, Any]) -> None:
    save(tmp_path / "f")
    task = {"task": TASK.__class__("choice", "{text}?", (" a", " b"))} if "task" in change else change
    with pytest.raises(PosteriorError, match=r"is of another posterior; delete it, or run `posterior calibrate` again"):
        load(tmp_path / "f", **task)


def test_a_renamed_file(tmp_path: Path) -> None:
    path = save(tmp_path / "f")
    path.rename(path.with_name("familiarity-particle-bfloat16.safetensors"))
    with pytest.raises(PosteriorError, match="is of another posterior"):
        load(tmp_path / "f")


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    path = save(tmp_path / "f")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PosteriorError, match="leads outside the folder; refused"):
        load(tmp_path / "f")


def damaged(path: Path, kind: str) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    if kind == "a number":
        tensors["mean"][0, 0] += 1
    elif kind == "a size":
        tensors["variance"] = tensors["variance"][:-1].clone()
    elif kind == "a missing tensor":
        del tensors["rest"]
    elif kind == "not finite":
        tensors["held"][0] = torch.nan
    elif kind == "no text":
        del metadata["about"]
    elif kind == "another text":
        metadata["about"] = json.dumps(json.loads(metadata["about"]) | {"n": 61})
    if kind in ("a size", "a missing tensor", "not finite"):  # somebody who computes the hash too
        metadata["hash"] = familiarity._digest(metadata["about"], tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "kind", ["a number", "a size", "a missing tensor", "not finite", "no text", "another text", "cut", "empty"]
)
def test_damage_is_found(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / "f")
    if kind in ("cut", "empty"):
        path.write_bytes(path.read_bytes()[: 100 if kind == "cut" else 0])
    else:
        damaged(path, kind)
    with pytest.raises(PosteriorError, match="is not what `posterior calibrate` wrote"):
        load(tmp_path / "f")


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("familiarity-map-float32.safetensors", True),
        ("familiarity-particle-bfloat16.safetensors", True),
        ("familiarity-map.safetensors", False),
        ("familiarity-map-float32.safetensors.txt", False),
    ],
)
def test_which_files_are_ours(name: str, ours: bool) -> None:
    assert familiarity.is_familiarity(Path("calibration") / name) == ours
    assert not familiarity.is_familiarity(Path(name))
    assert not familiarity.is_familiarity(Path("calibration") / "more" / name)
