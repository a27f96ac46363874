"""Where a posterior may be written: never in the place of what is not one posterior, and that is said first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posterior import fitting
from posterior.cli import imported
from posterior.errors import PosteriorError
from posterior.importing import adapters
from posterior.models import lora
from posterior.storage import artefact
from posterior.storage.destination import destination
from tests.killing import leftovers, snapshot

FORMAT_1 = Path(__file__).parents[1] / "format1"


def one(place: Path) -> None:
    shutil.copytree(FORMAT_1 / "mood", place)


def with_file(name: str, content: str = "mine") -> Callable[[Path], None]:
    def make(place: Path) -> None:
        one(place)
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content)

    return make


def two(place: Path) -> None:
    for name in ("mood", "gang"):
        shutil.copytree(FORMAT_1 / name, place / name)


def link(place: Path) -> None:
    one(place.with_name("elsewhere"))
    place.symlink_to(place.with_name("elsewhere"))


def link_inside(place: Path) -> None:
    one(place)
    place.with_name("secret").write_text("mine")
    (place / "map" / "more").symlink_to(place.with_name("secret"))


def alone(name: str, content: str = "mine") -> Callable[[Path], None]:
    def make(place: Path) -> None:
        place.mkdir()
        (place / name).write_text(content)

    return make


def empty_inside(place: Path) -> None:
    one(place)
    (place / "map" / "mine").mkdir()


FOREIGN = {
    "notes": with_file("notes.txt"),
    "a hidden file": with_file(".gitignore"),
    "in a folder of ours": with_file("map/README.md"),
    "among calibrations": with_file("calibration/plan.json"),
    "one posterior in another": lambda place: (one(place), shutil.copytree(FORMAT_1 / "gang", place / "gang")),
    "an empty folder": empty_inside,
    "a link inside": link_inside,
    "two posteriors": two,
    "arbitrary": alone("thesis.tex"),
    "no record of ours": alone("posterior.json", '{"mean": 0.5}'),
    "a list": alone("posterior.json", "[]"),
    "no JSON": alone("posterior.json", "{"),
    "newer": alone("posterior.json", '{"format": 3, "files": {}}'),
    "odd files": alone("posterior.json", '{"format": 1, "files": 3}'),
    "a file": lambda place: place.write_text("mine"),
    "a link": link,
    "a link to nothing": lambda place: place.symlink_to("nowhere"),
}
OWN = {
    "nothing": lambda place: None,
    "empty": lambda place: place.mkdir(),
    "format 1": one,
    "damaged": lambda place: (one(place), (place / "map" / "adapter_model.safetensors").write_text("x")),
    "incomplete": lambda place: (one(place), shutil.rmtree(place / "map")),
    "of a killed writer": with_file("calibration/.map-1.json.posterior-part"),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_one_posterior_is_refused(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(PosteriorError, match="choose another folder") as caught:
        destination(tmp_path / "out")
    assert "\n" not in str(caught.value) and str(tmp_path / "out") in str(caught.value)
    source = artefact.load(FORMAT_1 / "mood")
    with pytest.raises(PosteriorError, match="choose another folder"):
        write(tmp_path / "out", source)
    assert snapshot(tmp_path) == before and not leftovers(tmp_path)


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_one_posterior_and_nothing_else_is_replaced(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "out")
    assert destination(tmp_path / "out") == tmp_path / "out"
    assert write(tmp_path / "out", artefact.load(FORMAT_1 / "mood")).path == tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def write(out: Path, source: artefact.Posterior) -> artefact.Posterior:
    return artefact.save(
        out, family="laplace", base=source.base, task=source.task, lora_config=lora.read_config(source.map_dir),
        prior=source.prior, fit=source.fit, mean=lora.read_adapter(source.map_dir), curvature=source.curvature,
        precision=source.precision, width=source.width,
    )  # fmt: skip


def test_a_name_is_taken_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (".", "./", "deep/../here/"):
        assert destination(out) == Path(os.path.abspath(out))


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PosteriorError, match="file is no folder that you may write into"):
        destination(tmp_path / "file" / "out")
    monkeypatch.setattr(artefact.os, "access", lambda path, mode: False)
    with pytest.raises(PosteriorError, match="is no folder that you may write into"):
        destination(tmp_path / "deep" / "out")


def test_fit_and_import_refuse_before_any_work(
    tmp_path: Path, run_fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    two(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    for module in (fitting, adapters):
        monkeypatch.setattr(module, "resolve", lambda *_: pytest.fail("the base was looked for"))
    with pytest.raises(PosteriorError, match="choose another folder"):
        run_fit(tmp_path / "out")
    import argparse

    parser = argparse.ArgumentParser()
    imported.add_arguments(parser)
    words = [FORMAT_1 / "mood" / "map", "--out", tmp_path / "out", "--template", "{text}", "--answers", "a", "b"]
    with pytest.raises(PosteriorError, match="choose another folder"):
        imported.call(parser.parse_args(list(map(str, words))))
    assert snapshot(tmp_path / "out") == before


def test_an_equal_fit_keeps_the_calibrations(tmp_path: Path) -> None:
    """They are of the distribution; another fit has none."""
    from tests.posterior.storage.steps import record
    from tests.posterior.storage.steps import write as shifted

    source = artefact.load(FORMAT_1 / "mood")
    first = shifted(tmp_path / "out", source)
    made = record(first, 2.0)
    first.add(made)
    again = shifted(tmp_path / "out", source)
    assert again.hash == first.hash and again.calibration == {made.key: made}
    assert shifted(tmp_path / "out", source, 0.5).calibration == {}


@pytest.mark.parametrize("out", ["", "/", "a b", "-x", ".hidden", "x" * 65, "naïve", "x/../.y"])
def test_names_that_cannot_be_served(out: str) -> None:
    with pytest.raises(PosteriorError, match="the folder's name is the model's name"):
        destination(out)


def test_a_name_that_no_folder_can_have(tmp_path: Path) -> None:
    with pytest.raises(PosteriorError, match="File name too long; choose another folder"):
        destination(tmp_path / ("y" * 300) / "x")
