"""Loading, unloading and aliases: what is served before and after, what goes on, and what changes nothing."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posterior.errors import PosteriorError
from posterior.models.base import Base
from server.engine import Room
from server.errors import Absent, Conflict, NotFound, Refused, RequestError, Unavailable
from server.services import lifecycle as module
from tests.sealed import edit
from tests.server import folders
from tests.server.services.managed import Managed, base_in, gang


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return base_in(tmp_path)


@pytest.fixture
def root(tmp_path: Path, base: Base) -> Path:
    folders.laplace(tmp_path / "root", base)
    gang(tmp_path / "root", base)
    return tmp_path / "root"


@pytest.fixture
def managed(root: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> Managed:
    monkeypatch.setattr(module, "GRACE", 0.01)
    return Managed(root, base)


async def drained(managed: Managed) -> None:
    for _ in range(200):
        if all(one.state == "loaded" for one in managed.lifecycle.loaded):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it was not drained")


@pytest.mark.asyncio
async def test_a_new_version_takes_the_name_and_the_old_one_keeps_its_id(managed: Managed) -> None:
    old = managed.service.find("gang")
    before = set(managed.engine.loaded)
    gang(managed.root, managed.base, seed=50)
    one = await managed.lifecycle.load("gang")
    new = managed.service.find("gang")
    assert new.label == one.label != old.label and managed.label(old.id) == old.label
    assert managed.names() == ["tiny", "gang", "gang/map", "mood", "mood/map"], "an id is no name of its own"
    assert managed.label(f"gang/map@{one.label.partition('@')[2]}") == one.label
    added = set(managed.engine.loaded) - before
    assert before < set(managed.engine.loaded) and len(added) == 4 and min(added) > max(before)
    names = {adapter.name for adapter in (*new.particles, *old.particles)}
    assert len(names) == 6, "vLLM keys its prefix cache by them"
    assert new.posterior is not None
    assert managed.metric("posterior_info", posterior="gang", hash=new.posterior.hash, family="particles", base="tiny")
    assert managed.metric("posterior_adapters") == 5 + 4 + 4
    assert "4 adapters x 0.00179 MB = 0.00717 MB; " in managed.lines[-1] and "13 of 40 places" in managed.lines[-1]


@pytest.mark.asyncio
async def test_requests_go_on_with_what_they_began_with_and_then_it_is_forgotten(managed: Managed) -> None:
    served = managed.service.find("mood")
    leave = served.users.enter()
    one = await managed.lifecycle.unload("mood")
    assert one.state == "draining" and managed.names() == ["tiny", "gang", "gang/map"]
    with pytest.raises(NotFound):
        managed.service.find(served.id)
    await asyncio.sleep(0.05)
    assert {each.number for each in served.particles} <= set(managed.engine.loaded)
    assert served.key in managed.linearizer.held and managed.metric("posterior_draining") == 1
    leave()
    await drained(managed)
    assert len(managed.engine.loaded) == 4 and managed.linearizer.held == set()
    assert managed.metric("posterior_draining") == 0 and managed.metric("posterior_adapters") == 4


@pytest.mark.asyncio
async def test_one_that_comes_in_the_last_moment_is_waited_for_too(managed: Managed) -> None:
    served = managed.service.find("gang")
    await managed.lifecycle.unload("gang")
    leave = served.users.enter()  # it had found the model before, and asks only now
    await asyncio.sleep(0.05)
    assert {each.number for each in served.particles} <= set(managed.engine.loaded)
    leave()
    await drained(managed)
    assert len(managed.engine.loaded) == 5


@pytest.mark.asyncio
async def test_one_that_is_loaded_again_while_it_drains_stays(managed: Managed) -> None:
    served, held = managed.service.find("gang"), list(managed.engine.loaded)
    leave = served.users.enter()
    await managed.lifecycle.unload("gang")
    await managed.lifecycle.load("gang")
    leave()
    await asyncio.sleep(0.05)
    assert managed.service.find("gang").particles == served.particles and managed.engine.loaded == held
    assert managed.service.find("gang").users is served.users


@pytest.mark.asyncio
async def test_one_that_is_loaded_after_its_drain_has_other_numbers(managed: Managed) -> None:
    before = {each.number for each in managed.service.find("gang").particles}
    await managed.lifecycle.unload("gang")
    await drained(managed)
    await managed.lifecycle.load("gang")
    assert before.isdisjoint(each.number for each in managed.service.find("gang").particles)


@pytest.mark.asyncio
async def test_what_is_calibrated_again_keeps_its_adapters_and_stays_so(managed: Managed) -> None:
    before = managed.service.find("gang")
    assert before.posterior is not None
    again = replace(before.posterior)
    await managed.lifecycle.recalibrate({before.posterior.hash: again})
    await managed.lifecycle.point("other", "gang")
    for name in ("gang", "gang/map", "other", "other/map"):
        assert managed.service.find(name).posterior is again
    assert managed.service.find("gang").particles == before.particles
    assert managed.service.find("gang").users is before.users


@pytest.mark.asyncio
async def test_loading_what_is_loaded_reads_its_records_again(managed: Managed) -> None:
    first = managed.service.find("gang")
    again = await managed.lifecycle.load("gang")
    second = managed.service.find("gang")
    assert again.label == first.label and second.posterior is not first.posterior
    assert second.particles == first.particles and managed.metric("posterior_adapters") == 9


# What changes nothing


def state(managed: Managed) -> Any:
    return managed.names(), [one.label for one in managed.lifecycle.loaded], sorted(managed.engine.loaded)


async def refused(managed: Managed, name: str, kind: type[RequestError], words: str) -> None:
    before = state(managed)
    with pytest.raises(kind, match=words) as caught:
        await managed.lifecycle.load(name)
    assert "\n" not in caught.value.message and state(managed) == before


@pytest.mark.parametrize("name", ["", "../mood", "a/b", "mood@0123456789ab", ".hidden", "x" * 65])
@pytest.mark.asyncio
async def test_what_is_no_name(managed: Managed, name: str) -> None:
    await refused(managed, name, Refused, "is no name of a posterior")


@pytest.mark.asyncio
async def test_no_such_folder(managed: Managed) -> None:
    await refused(managed, "nobody", Absent, "has no 'nobody'")


def flip(folder: Path) -> None:
    path = folder / "map" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(folder: Path) -> None:
    shutil.move(folder, folder.parents[1] / "elsewhere")
    folder.symlink_to(folder.parents[1] / "elsewhere")


BAD: list[tuple[Callable[[Path], object], str]] = [
    (flip, "sha256 differs"),
    (link, "lies outside"),
    (lambda folder: (folder / "posterior.json").write_text("{"), "not a JSON object"),
    (lambda folder: (folder / "particles/001/adapter_config.json").unlink(), "is missing"),
    (lambda folder: edit(folder, base={"id": "other", "revision": None, "hash": "sha256:11"}), "was fitted on"),
    (lambda folder: edit(folder, format=99), "format 99"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
@pytest.mark.asyncio
async def test_a_bad_folder(managed: Managed, change: Callable[[Path], object], words: str) -> None:
    change(gang(managed.root / ".." / "new", managed.base, seed=9).path)
    shutil.move(managed.root / ".." / "new" / "gang", managed.root / "new")
    await refused(managed, "new", Conflict, words)


@pytest.mark.asyncio
async def test_all_particles_or_none(managed: Managed) -> None:
    folders.particles(managed.root, managed.base, name="new", seed=9)
    managed.engine.refuses = {"002"}
    await refused(managed, "new", Conflict, "does not load the adapter .*/002: it is broken")


@pytest.mark.asyncio
async def test_without_its_worker_a_laplace_posterior_is_not_loaded(managed: Managed) -> None:
    folders.laplace(managed.root, managed.base, name="new", seed=9)
    managed.linearizer.problem = Unavailable("it is starting again; try again later")
    await refused(managed, "new", Unavailable, "starting again")


@pytest.mark.asyncio
async def test_a_folder_that_is_replaced_while_it_is_loaded(managed: Managed, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.particles(managed.root, managed.base, name="new", seed=9)
    load = managed.engine.load

    async def slowly(*given: Any) -> None:
        folders.particles(managed.root, managed.base, name="new", seed=10)
        await load(*given)

    monkeypatch.setattr(managed.engine, "load", slowly)
    await refused(managed, "new", Conflict, "was replaced while it was loaded")


ROOMS = [
    (Room(9, 40, 1, None), "has rank 8, and this engine was started for 1; restart the server"),
    (Room(9, 40, 8, ("q_proj",)), "adapts v_proj, and this engine was started for q_proj; restart"),
    (Room(3, 40, 8, None), "has 3 particles, and this engine was started for 2 in a batch; restart"),
    (Room(9, 12, 8, None), "needs 4 adapters x 0.00179 MB = 0.00717 MB, and 9 of 12 places .*--hot-load-gib"),
]


@pytest.mark.parametrize(("room", "words"), ROOMS)
@pytest.mark.asyncio
async def test_what_the_engine_was_not_started_for(managed: Managed, room: Room, words: str) -> None:
    folders.particles(managed.root, managed.base, name="new", seed=9)
    managed.engine.room = room
    await refused(managed, "new", Conflict, words)


@pytest.mark.asyncio
async def test_what_cannot_be_unloaded(managed: Managed) -> None:
    before = state(managed)
    with pytest.raises(Absent, match="no posterior 'nobody' is loaded"):
        await managed.lifecycle.unload("nobody")
    await managed.lifecycle.point("live", "gang")
    with pytest.raises(Conflict, match="the alias 'live' leads to gang@"):
        await managed.lifecycle.unload("gang")
    await managed.lifecycle.unpoint("live")
    assert state(managed) == before
    gang(managed.root, managed.base, seed=50)
    await managed.lifecycle.load("gang")
    with pytest.raises(Conflict, match="several posteriors 'gang' are loaded; name one of gang@"):
        await managed.lifecycle.unload("gang")


# Aliases


@pytest.mark.asyncio
async def test_an_alias_moves_and_goes_back_and_a_restart_keeps_it(managed: Managed) -> None:
    old = managed.label("gang")
    gang(managed.root, managed.base, seed=50)
    new = (await managed.lifecycle.load("gang")).label
    await managed.lifecycle.point("live", old)
    assert managed.label("live") == managed.label("live/map") == old
    assert managed.names() == ["tiny", "gang", "gang/map", "live", "live/map", "mood", "mood/map"]
    assert (
        managed.service.find("live").id == f"live@{old.partition('@')[2]}" and managed.service.find("live").key == old
    )
    moved = await managed.lifecycle.point("live", new)
    assert (moved.posterior, moved.previous) == (new, old) and managed.label("live") == new
    assert managed.metric("posterior_alias_info", alias="live", posterior="gang", hash=new.partition("@")[2]) == 1
    assert managed.metric("posterior_alias_info", alias="live", posterior="gang", hash=old.partition("@")[2]) is None
    back = await managed.lifecycle.point("live", None)
    assert (back.posterior, back.previous) == (old, new) and managed.label("live") == old
    assert (await managed.lifecycle.point("live", old)).previous == new, "the same once more changes nothing"
    await managed.lifecycle.point("live", "mood")
    again = Managed(managed.root, managed.base)
    assert again.label("live") == managed.label("mood") and again.lifecycle.aliases == managed.lifecycle.aliases


@pytest.mark.asyncio
async def test_an_alias_takes_a_name_that_a_folder_has(managed: Managed) -> None:
    old, mood = managed.service.find("gang"), managed.label("mood")
    await managed.lifecycle.point("gang", mood)
    assert managed.label("gang") == mood and managed.label(old.id) == old.label
    gang(managed.root, managed.base, seed=50)
    await managed.lifecycle.load("gang")
    assert managed.label("gang") == mood, "only the alias moves it"
    await managed.lifecycle.unpoint("gang")
    assert managed.label("gang").startswith("gang@") and managed.label("gang") != old.label
    assert "live" not in json.loads((managed.root / "aliases.json").read_text())["aliases"]


@pytest.mark.asyncio
async def test_an_alias_of_what_is_gone_leads_nowhere_rather_than_elsewhere(managed: Managed) -> None:
    old = managed.label("gang")
    await managed.lifecycle.point("gang", old)
    gang(managed.root, managed.base, seed=50)
    again = Managed(managed.root, managed.base)
    assert "gang" not in again.names() and "mood" in again.names()
    assert f"the alias leads to {old}, which is not loaded" in again.service.registry.refused["gang"]
    assert again.metric("posterior_refused") == 1
    gang(managed.root, managed.base)
    await again.lifecycle.load("gang")
    assert again.label("gang") == old and again.metric("posterior_refused") == 0


ALIASES: list[tuple[str, str | None, type[RequestError], str]] = [
    ("tiny", "gang", Refused, "cannot be an alias"),
    ("a/map", "gang", Refused, "cannot be an alias"),
    ("live", "nobody", Conflict, "no posterior 'nobody' is loaded.*load it first"),
    ("live", "gang@000000000000", Conflict, "is loaded"),
    ("nobody", None, Absent, "no alias 'nobody' to roll back"),
    ("known", None, Conflict, "has led nowhere else"),
]


@pytest.mark.parametrize(("name", "target", "kind", "words"), ALIASES)
@pytest.mark.asyncio
async def test_what_is_no_alias(
    managed: Managed, name: str, target: str | None, kind: type[RequestError], words: str
) -> None:
    await managed.lifecycle.point("known", "gang")
    before = managed.names(), managed.lifecycle.aliases, (managed.root / "aliases.json").read_text()
    with pytest.raises(kind, match=words):
        await managed.lifecycle.point(name, target)
    assert (managed.names(), managed.lifecycle.aliases, (managed.root / "aliases.json").read_text()) == before


@pytest.mark.asyncio
async def test_an_alias_that_cannot_be_kept_does_not_move(managed: Managed) -> None:
    (managed.root / "aliases.json").mkdir()
    with pytest.raises(Conflict, match="the aliases stay as they were: cannot write"):
        await managed.lifecycle.point("live", "gang")
    assert "live" not in managed.names() and not managed.lifecycle.aliases
    with pytest.raises(Absent, match="there is no alias 'live'"):
        await managed.lifecycle.unpoint("live")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no readable JSON object"),
        ('{"format": 2, "aliases": {}}', "format"),
        ('{"format": 1, "aliases": {"../x": {"posterior": "gang@000000000000"}}}', "aliases"),
        ('{"format": 1, "aliases": {"x": {"posterior": "gang"}}}', "posterior"),
    ],
)
def test_aliases_that_make_no_sense_end_the_start(root: Path, base: Base, text: str, words: str) -> None:
    (root / "aliases.json").write_text(text)
    with pytest.raises(PosteriorError, match=f"aliases.json.*{words}.*correct it, or delete it") as caught:
        Managed(root, base)
    assert "\n" not in str(caught.value)
