"""The self-test: what is served is compared with what was stored, at the start and at a load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posterior.errors import PosteriorError
from posterior.models.base import Base
from posterior.storage import artefact
from server.errors import Conflict
from server.http import predictive
from server.metrics import Observation
from server.services import probing
from server.services.warming import warm_up
from tests.server import folders
from tests.server.services.managed import Managed, base_in, probed


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return base_in(tmp_path)


@pytest.fixture
def root(tmp_path: Path, base: Base) -> Path:
    folders.laplace(tmp_path / "root", base)
    folders.particles(tmp_path / "root", base)
    return tmp_path / "root"


def with_probes(root: Path, base: Base, **changes: Any) -> Managed:
    """A server of both posteriors, of which "gang" has probes."""
    gang = Managed(root, base).service.find("gang")
    assert gang.posterior is not None
    probed(gang.posterior, gang, **changes)
    return Managed(root, base, dtype="float32", max_model_len=256)


@pytest.mark.asyncio
async def test_what_is_served_as_it_was_fitted(root: Path, base: Base) -> None:
    managed = with_probes(root, base)
    before = managed.service.find("gang").posterior
    assert before is not None and before.hash == artefact.load(before.path).hash, "probes are no part of it"
    verdict = await probing.examine(managed.service, managed.service.find("gang"))
    assert verdict.refusal is None and verdict.notes == () and verdict.rows == 4
    assert verdict.difference is not None and verdict.difference < 1e-6 and verdict.tolerance == 0.005
    assert verdict.gap is None, "its rows may be training rows"
    lines = await managed.lifecycle.examine()
    assert [line for line in lines if "no probes" in line] == lines and lines[0].startswith("mood@")
    hash = managed.label("gang").partition("@")[2]
    difference = managed.metric("posterior_probe_difference", posterior="gang", hash=hash)
    assert difference is not None and difference < 1e-6
    assert managed.metric("posterior_probe_gap", posterior="gang", hash=hash) is None


@pytest.mark.parametrize(("wrong", "refused"), [(0.004, False), (0.006, True)])
@pytest.mark.asyncio
async def test_the_tolerance(root: Path, base: Base, wrong: float, refused: bool) -> None:
    managed = with_probes(root, base, wrong=wrong)
    verdict = await probing.examine(managed.service, managed.service.find("gang"))
    assert verdict.difference == pytest.approx(wrong, abs=1e-6) and (verdict.refusal is not None) == refused


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.asyncio
async def test_half_precision_is_allowed_more(root: Path, base: Base, dtype: str) -> None:
    managed = with_probes(root, base, wrong=0.015)
    managed.engine.dtype = dtype
    assert (await probing.examine(managed.service, managed.service.find("gang"))).refusal is None


@pytest.mark.asyncio
async def test_another_particle_is_noticed(root: Path, base: Base) -> None:
    managed = with_probes(root, base)
    served = managed.service.find("gang")
    swapped = type(served)(
        "gang", served.posterior, served.map, (*served.particles[:2], served.particles[1]), served.weights
    )
    verdict = await probing.examine(managed.service, swapped)
    assert verdict.refusal is not None and "it is not served as it was fitted" in verdict.refusal


@pytest.mark.asyncio
async def test_what_differs_is_not_served_at_the_start(root: Path, base: Base) -> None:
    managed = with_probes(root, base, wrong=0.2)
    lines = await warm_up(managed.service)
    assert "gang is not served: it is not served as it was fitted: a probability of its probes differs by 0.2" in (
        "\n".join(lines)
    )
    assert managed.names() == ["tiny", "mood", "mood/map"] and managed.metric("posterior_refused") == 1
    assert len(managed.engine.loaded) == 5
    await managed.lifecycle.unload("mood")
    with pytest.raises(PosteriorError, match="can be served: gang: it is not served as it was fitted"):
        await managed.lifecycle.examine()


@pytest.mark.asyncio
async def test_what_differs_is_not_loaded(root: Path, base: Base) -> None:
    managed = with_probes(root, base)
    new = folders.particles(root, base, name="new", seed=9)
    served = managed.service.find("gang")
    probed(new, served, wrong=0.0)  # of other adapters
    before = managed.names(), sorted(managed.engine.loaded)
    with pytest.raises(Conflict, match="'new' cannot be served|is refused: it is not served as it was fitted"):
        await managed.lifecycle.load("new")
    assert (managed.names(), sorted(managed.engine.loaded)) == before


@pytest.mark.asyncio
async def test_the_linearised_predictive_is_compared_too(root: Path, base: Base) -> None:
    managed = Managed(root, base, dtype="float32", max_model_len=256)
    mood = managed.service.find("mood")
    assert mood.posterior is not None
    made = probed(mood.posterior, mood)
    rows = [row.model_copy(update={"linearized": (0.5, 0.5)}) for row in made.rows]
    mood.posterior.add_probes(made.model_copy(update={"rows": tuple(rows)}))
    with pytest.raises(Conflict, match="not served as it was fitted"):
        await managed.lifecycle.load("mood")


@pytest.mark.asyncio
async def test_particles_of_another_sampler_are_not_compared(root: Path, base: Base) -> None:
    managed = Managed(root, base, dtype="float32", max_model_len=256)
    mood = managed.service.find("mood")
    assert mood.posterior is not None
    made = probed(mood.posterior, mood)
    mood.posterior.add_probes(made.model_copy(update={"draws": "v1.torch1.0"}))
    one = await managed.lifecycle.load("mood")
    assert one.verdict.difference is not None and any("were drawn by v1.torch1.0" in line for line in managed.lines)


@pytest.mark.parametrize("right", [0, 2, 4])
@pytest.mark.asyncio
async def test_a_posterior_that_is_too_sure_is_a_warning_and_a_metric(
    root: Path, base: Base, right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer is the same one, of the same confidence: the labels say how many are right."""
    managed = with_probes(root, base, heldout=True)
    gang = managed.service.find("gang")
    assert gang.posterior is not None and gang.posterior.probes is not None
    asked = {"model": "gang", "inputs": [{"text": "good"}]}
    reply = await predictive.reply(managed.service, asked, Observation(managed.service.metrics, "test"))
    (item,) = reply["data"]
    confidence, best = item["confidence"], [" negative", " positive"].index(item["answer"])
    made = gang.posterior.probes
    labels = [best if number < right else 1 - best for number in range(4)]
    rows = [
        probe.model_copy(update={"label": label, "row": {**probe.row, "label": label}})
        for probe, label in zip(made.rows, labels, strict=True)
    ]
    gang.posterior.add_probes(made.model_copy(update={"rows": tuple(rows)}))
    monkeypatch.setattr(probing, "Z", 1.0)
    one = await managed.lifecycle.load("gang")
    gap = confidence - right / 4
    hash = one.label.partition("@")[2]
    assert managed.metric("posterior_probe_gap", posterior="gang", hash=hash) == pytest.approx(gap)
    z = gap * 4 / (4 * confidence * (1 - confidence)) ** 0.5
    assert managed.metric("posterior_probe_gap_z", posterior="gang", hash=hash) == pytest.approx(z)
    assert (one.verdict.gap, one.verdict.z) == (pytest.approx(gap), pytest.approx(z))
    warned = ["too sure" in line for line in managed.lines if "held-out probes" in line]
    assert warned == ([z > 0] if abs(z) > 1 else []) and (right or warned == [True])
    assert "gang" in managed.names(), "it is served all the same"
