"""The cache of draws: verified, shared, bounded, and never changed under somebody who uses it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posterior.errors import PosteriorError
from posterior.files import atomic
from posterior.laplace import blockwise
from posterior.storage import artefact, draws
from tests.killing import snapshot

FORMAT_1 = Path(__file__).parents[1] / "format1"
GIB = 2**30


@pytest.fixture
def mood() -> artefact.Posterior:
    return artefact.load(FORMAT_1 / "mood")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test ends like a process: what it used is free."""
    yield
    release()


def release() -> None:
    for file in draws._held.values():
        os.close(file)
    draws._held.clear()


@contextlib.contextmanager
def another_server(entry: Path) -> Iterator[None]:
    """Somebody else uses the draws: flock does not care in which process."""
    file = os.open(entry / draws.CONTENTS, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_SH)
    yield
    os.close(file)


def names(cache: Path) -> list[str]:
    return sorted(path.name.partition("-k")[2] for path, _ in draws._entries(cache))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_name_says_what_the_draws_depend_on(
    mood: artefact.Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mood.adapters(2, tmp_path)[0].parent
    assert first.name.startswith(f"{mood.hash[:16]}-s0-v{blockwise.SAMPLER}.torch2.") and first.name.endswith("-k2")
    assert mood.adapters(2, tmp_path, seed=1)[0].parent != first
    monkeypatch.setattr(blockwise, "SAMPLER", blockwise.SAMPLER + 1)
    assert mood.adapters(2, tmp_path)[0].parent != first
    assert len(names(tmp_path)) == 3


def test_fewer_draws_are_the_first_of_more(mood: artefact.Posterior, tmp_path: Path) -> None:
    more, fewer = mood.adapters(4, tmp_path / "a"), mood.adapters(2, tmp_path / "a")
    assert fewer == more[:2] and names(tmp_path / "a") == ["4"]
    for alone, shared in zip(mood.adapters(2, tmp_path / "b"), fewer, strict=True):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (alone / name).read_bytes() == (shared / name).read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: flip(entry / "001" / "adapter_model.safetensors"),
        lambda entry: os.truncate(entry / "000" / "adapter_model.safetensors", 100),
        lambda entry: (entry / "001" / "adapter_config.json").write_text("{}"),
        lambda entry: shutil.rmtree(entry / "001"),
        lambda entry: (entry / draws.CONTENTS).write_text("{"),
        lambda entry: (entry / draws.CONTENTS).write_text("{}"),
        lambda entry: (entry / draws.CONTENTS).unlink(),
    ],
)
def test_a_damaged_draw_is_made_again(
    mood: artefact.Posterior, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    entry = mood.adapters(2, tmp_path)[0].parent
    whole = snapshot(entry)
    release()
    damage(entry)
    assert mood.adapters(2, tmp_path)[0].parent == entry and snapshot(entry) == whole and names(tmp_path) == ["2"]


def test_a_damaged_draw_in_use_is_left_alone(mood: artefact.Posterior, tmp_path: Path) -> None:
    entry = mood.adapters(2, tmp_path)[0].parent
    release()
    with another_server(entry):
        flip(entry / "001" / "adapter_model.safetensors")
        damaged = snapshot(entry)
        again = mood.adapters(2, tmp_path)[0].parent
        assert again != entry and snapshot(entry) == damaged and names(tmp_path) == ["2", "2.1"]
        assert mood.adapters(2, tmp_path)[0].parent == again


def test_the_least_recently_used_go_first(
    mood: artefact.Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what is in use, nor what is not ours."""
    for seed in range(3):
        entry = mood.adapters(2, tmp_path, seed)[0].parent
        os.utime(entry / draws.CONTENTS, (seed, seed))
    size = sum(path.stat().st_size for path in entry.rglob("*") if path.is_file())
    kept = [entry.parent / entry.name.replace("-s2-", f"-s{seed}-") for seed in range(3)]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine" * size)
    (tmp_path / ".0000-k8-s0.posterior-work").mkdir()
    (tmp_path / f".{entry.name}.posterior-work" / "new").mkdir(parents=True)
    release()
    monkeypatch.setenv("POSTERIOR_CACHE_GIB", str(3.5 * size / GIB))
    with another_server(kept[0]):
        mood.adapters(2, tmp_path, seed=3)
    assert [path.exists() for path in kept] == [True, False, True], "the oldest is in use"
    assert (tmp_path / "mine" / "notes.txt").is_file() and (tmp_path / ".0000-k8-s0.posterior-work").is_dir()
    assert not (tmp_path / f".{entry.name}.posterior-work").exists(), "of a maker that was killed"
    monkeypatch.setenv("POSTERIOR_CACHE_GIB", "0")
    last = mood.adapters(3, tmp_path, seed=4)[0].parent
    assert last.is_dir() and len(names(tmp_path)) == 2, "what is asked for, and what this process uses"


@pytest.mark.parametrize("given", ["much", "-1", "nan"])
def test_a_limit_that_is_no_number(
    mood: artefact.Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("POSTERIOR_CACHE_GIB", given)
    with pytest.raises(PosteriorError, match=f"POSTERIOR_CACHE_GIB is '{given}'; it must be a number of GiB"):
        mood.adapters(2, tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_cache_that_cannot_be_written_is_one_line(
    mood: artefact.Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It names the variable; draws that are there already are used."""
    first = mood.adapters(2, tmp_path)
    release()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic, "locked", fail)
    monkeypatch.setattr(draws.os, "utime", fail)
    assert mood.adapters(2, tmp_path) == first
    with pytest.raises(PosteriorError, match=f"{os.strerror(number)}; set POSTERIOR_CACHE to a folder") as caught:
        mood.adapters(3, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_where_the_cache_should_be(mood: artefact.Posterior, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    for cache in (tmp_path / "cache", tmp_path / "cache" / "draws"):
        with pytest.raises(PosteriorError, match="set POSTERIOR_CACHE to a folder"):
            mood.adapters(2, cache)


@pytest.mark.parametrize("name", ["mood", "gang"])
def test_no_particles_is_one_line(name: str, tmp_path: Path) -> None:
    posterior = artefact.load(FORMAT_1 / name)
    for ask in (posterior.mixture, lambda k: list(posterior.thetas(k)), lambda k: posterior.adapters(k, tmp_path)):
        with pytest.raises(PosteriorError, match="0 particles asked for; at least 1 is needed"):
            ask(0)


def test_draws_of_the_format_before_are_left_alone(mood: artefact.Posterior, tmp_path: Path) -> None:
    before = tmp_path / f"{mood.hash[:12]}-k2-s0"
    (before / "000").mkdir(parents=True)
    (before / "000" / "adapter_model.safetensors").write_bytes(b"of an older server")
    kept = snapshot(before)
    assert mood.adapters(2, tmp_path)[0].parent != before and snapshot(before) == kept
