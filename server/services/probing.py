"""The self-test of a posterior: does this server say of the probes what was stored with the posterior?

`posterior fit` and `posterior probe` compute the probes with transformers and peft. Here vLLM, and the worker of the
linearised predictive, compute the same: for theta*, for each particle, and linearised. A wrong adapter, template,
tokenizer or number format makes another probability.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from posterior.calibration import probes as stored
from posterior.calibration.probes import Probe, Probes
from posterior.calibration.records import Record
from posterior.data.examples import Example, Examples
from posterior.errors import PosteriorError
from posterior.models.devices import Dtype
from posterior.predictive.mixture import from_gaussian
from posterior.storage.artefact import Posterior
from server.errors import first
from server.services.predictive import Service
from server.services.registry import Served

PARTICLE_ROWS, LINEARIZED_ROWS = 4, 2  # that are computed under every particle, and linearised: the start waits
Z = 3.0  # standard errors: a calibrated posterior is beyond them once in 370 times


@dataclass(frozen=True)
class Verdict:
    """What a self-test found. difference: the largest of a probability, and the tolerance; gap, z: how much too sure
    the posterior is on held-out probes (posterior.calibration.probes.signed_gap); None: not tested. refusal: why it
    must not be served. notes: what whoever runs the server should know."""

    rows: int = 0
    difference: float | None = None
    tolerance: float | None = None
    gap: float | None = None
    z: float | None = None
    refusal: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any] | None:
        """Its numbers as JSON; None where there are no probes."""
        names = ("rows", "difference", "tolerance", "gap", "z")
        return {name: getattr(self, name) for name in names} if self.rows else None


async def examine(service: Service, served: Served) -> Verdict:
    """The self-test of a posterior that the engine and the worker hold. Raises RequestError for what cannot answer
    now."""
    posterior = served.posterior
    if posterior is None or posterior.probes is None:
        way = "`posterior probe` adds them"
        return Verdict(notes=(f"{served.key} has no probes: whether it is served as fitted is not known; {way}",))
    probes = posterior.probes
    try:
        rows = [probe.row for probe in probes.rows]
        examples = await asyncio.to_thread(stored.examples, posterior.task, service.tokenizer, rows)
    except PosteriorError as error:
        return Verdict(len(probes.rows), refusal=f"its probes cannot be read with this base: {error}")
    if any(not _alike(*each) for each in zip(examples, probes.rows, strict=True)):
        return Verdict(len(probes.rows), refusal="this base reads its probes as other questions; serve its own base")
    longest = max(len(each.prompt) + max(map(len, each.continuations)) for each in examples)
    if longest > service.engine.max_model_len:
        return Verdict(notes=(f"{served.key} was not tested: a probe has {longest} tokens, more than --max-model-len",))
    particles, notes = _particles(served, posterior, probes)
    differences = [await _by_engine(service, served, examples, probes, particles)]
    if service.linearizer is not None and probes.rows[0].linearized is not None:
        differences.append(await _linearized(service, served, examples, probes))
    worst = max(differences, key=lambda each: each[0] / each[1])
    verdict = Verdict(len(probes.rows), *worst, notes=notes)
    if not worst[0] <= worst[1]:
        refusal = (
            f"it is not served as it was fitted: a probability of its probes differs by {worst[0]:.3g}, and rounding "
            f"explains {worst[1]:g}; compare the base, its tokenizer and --dtype with those of the fit"
        )
        return replace(verdict, refusal=refusal)
    if not probes.heldout or not posterior.task.has_candidates:
        return verdict
    return _with_gap(service, served, posterior, probes, verdict)


def _alike(example: Example, probe: Probe) -> bool:
    """Whether the row is the same question here as where its probabilities were computed."""
    return len(example.continuations) == len(probe.probability[0]) and example.label == probe.label


def _particles(served: Served, posterior: Posterior, probes: Probes) -> tuple[int, tuple[str, ...]]:
    """How many particles can be compared, and what to say of that."""
    if probes.draws == posterior.sampler:
        return min(len(served.particles), probes.particles), ()
    note = (
        f"the particles of {served.key} were drawn by {probes.draws} for its probes, and here by {posterior.sampler}: "
        "they are others, and were not compared; `posterior probe` makes new probes"
    )
    return 0, (note,)


async def _by_engine(
    service: Service, served: Served, examples: Examples, probes: Probes, particles: int
) -> tuple[float, float]:
    """The largest difference of the engine's probabilities, under theta* and the particles, and its tolerance."""
    adapters = [served.map, *served.particles[:particles]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    service.engine.score(
                        [list(each.prompt)], each.continuations, adapters if row < PARTICLE_ROWS else adapters[:1]
                    )
                )
                for row, each in enumerate(examples)
            ]
    except ExceptionGroup as errors:
        raise first(errors) from errors
    worst = 0.0
    for example, task, probe in zip(examples, tasks, probes.rows, strict=True):
        log_p = task.result().log_p[0]
        lengths = torch.tensor([len(tokens) for tokens in example.continuations])
        found = stored.probabilities(log_p, lengths, examples.scoring)
        worst = _larger(worst, found, torch.tensor(probe.probability[: len(log_p)], dtype=torch.float64))
    return worst, stored.tolerance(cast(Dtype, service.engine.dtype), probes.dtype)


async def _linearized(service: Service, served: Served, examples: Examples, probes: Probes) -> tuple[float, float]:
    """The same of the linearised predictive, on a few rows."""
    assert service.linearizer is not None
    worst = 0.0
    for example, probe in list(zip(examples, probes.rows, strict=True))[:LINEARIZED_ROWS]:
        ((mean, covariance),) = await service.linearizer.moments(
            served.key, [list(example.prompt)], example.continuations
        )
        found = from_gaussian(mean, covariance).probability
        worst = _larger(worst, found, torch.tensor(probe.linearized, dtype=torch.float64))
    return worst, stored.tolerance(service.linearizer.dtype, probes.dtype)


def _larger(worst: float, found: torch.Tensor, expected: torch.Tensor) -> float:
    """The larger difference; what is not a number is infinitely far."""
    difference = float((found.double() - expected).abs().max())
    return max(worst, math.inf if math.isnan(difference) else difference)


def _with_gap(service: Service, served: Served, posterior: Posterior, probes: Probes, verdict: Verdict) -> Verdict:
    """The verdict with how much too sure the answers are that clients get by default. They are as stored, or the
    posterior would have been refused; nothing is computed again."""
    confidence, right = [], []
    for probe in probes.rows:
        p = _default(served, probe)
        record = _record(service, posterior, probe, served)
        p = p if record is None else record.apply(p)
        confidence.append(float(p.max()))
        right.append(int(p.argmax()) == probe.label)
    gap, z = stored.signed_gap(confidence, right)
    verdict = replace(verdict, gap=gap, z=z)
    if abs(z) <= Z:
        return verdict
    kind = "too sure" if z > 0 else "not sure enough"
    mean = sum(confidence) / len(right)
    note = (
        f"{served.key} is {kind}: on its {len(right)} held-out probes the mean confidence is {mean:.2f}, and "
        f"{sum(right)} answers are right (z = {z:.1f}); calibrate it on rows like those it is asked"
    )
    return replace(verdict, notes=(*verdict.notes, note))


def _default(served: Served, probe: Probe) -> torch.Tensor:
    """The probabilities [C] of a probe's answers by the default predictive."""
    name, table = served.predictives[0], torch.tensor(probe.probability, dtype=torch.float64)
    if name == "linearized" and probe.linearized is not None:
        return torch.tensor(probe.linearized, dtype=torch.float64)
    if name == "mixture" and len(table) > 1:
        weights = torch.tensor(served.weights[: len(table) - 1], dtype=torch.float64)
        return (weights / weights.sum()) @ table[1 : len(weights) + 1]
    return table[0]


def _record(service: Service, posterior: Posterior, probe: Probe, served: Served) -> Record | None:
    """The calibration that such answers get, if there is one: of the question's kind, or of all kinds."""
    name = served.predictives[0]
    kind = posterior.task.question_of(probe.row).type if posterior.task.kind == "decision" else None
    found = {
        key.question: record
        for key, record in posterior.calibration.items()
        if (key.predictive, key.dtype) == (name, service.dtype(name))
        and key.answers in (None, len(probe.probability[0]))
        and (name != "mixture" or key.particles == len(served.particles))
    }
    return found.get(kind) or found.get("any")
