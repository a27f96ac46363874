"""A lifecycle over folders with random weights of a tiny base, and an engine without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from posterior.calibration import probes
from posterior.calibration.probes import Probe, Probes
from posterior.calibration.records import template_hash
from posterior.models.base import Base
from posterior.storage.artefact import Posterior
from server.metrics import Metrics
from server.services.lifecycle import Lifecycle
from server.services.predictive import Service
from server.services.registry import Served, Source
from tests.server import fakes, folders

PARTICLES = 4
ROWS = [{"text": text, "label": label} for text, label in (("good", 1), ("bad", 0), ("so so", 0), ("fine", 1))]


def base_in(folder: Path) -> Base:
    """A base without weights."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(**sizes).save_pretrained(folder / "base")
    return Base(folder / "base", "tiny", None, "sha256:00")


class Managed:
    """A service with a lifecycle over `root`; lines: what was said to whoever runs it."""

    def __init__(self, root: Path, base: Base, **engine: Any) -> None:
        self.root, self.base = root, base
        self.engine, self.linearizer, self.lines = fakes.Engine(**engine), fakes.Linearizer(), list[str]()
        source = Source(root, base, PARTICLES, root.parent / "cache")
        served = source.all()
        self.linearizer.held |= set(served.laplace)
        self.engine.loaded += [adapter.number for adapter in served.adapters]
        parts: Any = (served, self.engine, self.linearizer, fakes.Tokenizer(), Metrics())
        self.service = Service(*parts)
        self.lifecycle = Lifecycle(self.service, source, self._made, self.lines.append)
        self.service.lifecycle = self.lifecycle

    def _made(self, folders: Any) -> Any:
        raise AssertionError(f"there is a worker already, and no need of one for {folders}")

    def names(self) -> list[str]:
        """The models that are served by name."""
        return list(self.service.registry.served)

    def label(self, name: str) -> str:
        """What answers call the posterior to which this name or id leads now."""
        found = self.service.find(name).label
        assert found is not None
        return found

    def metric(self, name: str, **labels: str) -> float | None:
        return self.service.metrics.registry.get_sample_value(name, labels)


def probed(posterior: Posterior, served: Served, *, wrong: float = 0.0, heldout: bool = False) -> Probes:
    """The probes that fit what the fake engine says under the adapters of `served`, but for `wrong`."""
    adapters = [served.map, *served.particles]
    rows = []
    for row in ROWS:
        scores = torch.stack([fakes.particle_logits(each.number if each else 0, 2) for each in adapters])
        p = scores.softmax(-1)
        p[0] += wrong * torch.tensor([1.0, -1.0])
        probability = tuple(tuple(each) for each in p.clamp(0, 1).tolist())
        rows.append(Probe(row=row, label=int(str(row["label"])), probability=probability))
    made = Probes(
        base=posterior.base["hash"], posterior=posterior.hash, template=template_hash(posterior.task), dtype="float32",
        draws=posterior.sampler, heldout=heldout, rows=tuple(rows),
    )  # fmt: skip
    probes.save(posterior.path, made)
    return made


def gang(root: Path, base: Base, seed: int = 0) -> Posterior:
    """The folder "gang", of this seed."""
    return folders.particles(root, base, seed=seed)
