"""The posteriors of one folder, verified, with their particles on disk and their names in the API."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from posterior.data.scoring import Scoring
from posterior.errors import PosteriorError
from posterior.files import atomic
from posterior.models import lora, servable
from posterior.models.base import Base
from posterior.storage import artefact
from posterior.storage.artefact import Posterior
from posterior.storage.destination import NAME
from server.engine import Adapter
from server.metrics import Metrics
from server.services.options import PredictiveName

HASH_DIGITS = 12


@dataclass(frozen=True)
class Served:
    """One model name of the API.

    `posterior` and `map` are None for the bare base; `particles`, the heaviest first, is empty for it and for
    "<name>/map".
    """

    name: str
    posterior: Posterior | None = None
    map: Adapter | None = None
    particles: tuple[Adapter, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def label(self) -> str | None:
        """name@hash of the posterior."""
        return None if self.posterior is None else _label(self.posterior)

    @property
    def owner(self) -> str:
        """The label `posterior` of metrics."""
        return "none" if self.posterior is None else self.posterior.name

    @property
    def id(self) -> str:
        """What answers call the model: its name, and the hash where it has a posterior. Clients may ask by either."""
        return self.name if self.posterior is None else f"{self.name}@{self.posterior.hash[:HASH_DIGITS]}"

    @property
    def predictives(self) -> tuple[PredictiveName, ...]:
        """The predictives this name can give for candidate answers, its default first."""
        if self.posterior is None or not self.particles:
            return ("map",)
        return self.posterior.predictives

    @property
    def scoring(self) -> Scoring:
        """How candidates are scored: as the posterior was fitted, the bare base by the defaults."""
        return Scoring() if self.posterior is None else self.posterior.task.scoring


@dataclass(frozen=True)
class Registry:
    """Everything the server serves, by model name; and why a folder is not served, by its name."""

    base: Base
    served: Mapping[str, Served]
    refused: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str) -> Served | None:
        """The model with this name or id."""
        found = self.served.get(name) or self.served.get(name.partition("@")[0])
        return found if found is not None and name in (found.name, found.id) else None

    @property
    def posteriors(self) -> list[Posterior]:
        """Each posterior once, in order of its name."""
        return [entry.posterior for entry in self.served.values() if entry.posterior is not None and entry.particles]

    @property
    def adapters(self) -> list[Adapter]:
        """Each adapter once."""
        every = (
            adapter
            for entry in self.served.values()
            for adapter in (entry.map, *entry.particles)
            if adapter is not None
        )
        return list(dict.fromkeys(every))

    @property
    def public(self) -> dict[str, Adapter]:
        """Model names that generate text with an adapter."""
        return {name: entry.map for name, entry in self.served.items() if entry.map is not None}

    @property
    def modules(self) -> set[str]:
        """The modules that adapters change."""
        return {name for posterior in self.posteriors for name in lora.modules(posterior.map_dir)}

    @property
    def rank(self) -> int:
        """The largest rank of all adapters."""
        return max(servable.rank(lora.read_config(posterior.map_dir)) for posterior in self.posteriors)

    def only(self, names: Container[str]) -> Registry:
        """The models of these names, where a posterior's name stands for its MAP too."""
        kept = {
            name: entry
            for name, entry in self.served.items()
            if name in names or (entry.posterior is not None and entry.posterior.name in names)
        }
        return Registry(self.base, kept)

    def calibrated(self, posteriors: Mapping[str, Posterior]) -> Registry:
        """The same, with these posteriors by their hashes in place of what they were: calibrated again."""
        served = {
            name: entry
            if entry.posterior is None
            else replace(entry, posterior=posteriors.get(entry.posterior.hash, entry.posterior))
            for name, entry in self.served.items()
        }
        return replace(self, served=served)

    def describe(self, metrics: Metrics) -> None:
        """Set the gauges that say what is served."""
        metrics.refused.set(len(self.refused))
        for item in self.posteriors:
            metrics.info.labels(item.name, item.hash, item.family, self.base.id).set(1)

    def without(self, refused: Mapping[Adapter, str]) -> Registry:
        """The rest, when the engine has refused these adapters, for these reasons."""
        reasons = {
            entry.posterior.name: f"{reason} (adapter {adapter.path})"
            for adapter, reason in refused.items()
            for entry in self.served.values()
            if entry.posterior is not None and adapter in (entry.map, *entry.particles)
        }
        kept = {
            name: entry
            for name, entry in self.served.items()
            if entry.posterior is None or entry.posterior.name not in reasons
        }
        return Registry(self.base, kept, {**self.refused, **reasons})

    def check(self, root: Path) -> None:
        """Raises PosteriorError with the reasons when no posterior is left to serve."""
        if self.posteriors:
            return
        if self.refused:
            raise PosteriorError(
                f"no posterior in {root} can be served: " + "; ".join(f"{k}: {v}" for k, v in self.refused.items())
            )
        raise PosteriorError(
            f"no posterior in {root}: expected folders that hold a posterior.json; `posterior fit` makes one"
        )


def load(root: Path, base: Base, *, particles: int, cache: Path, only: str | None = None) -> Registry:
    """All that is served of the posterior folders in `root`, or only the one of this name, each verified, with
    `particles` samples of each Laplace posterior in `cache`.

    A folder that is damaged, of another base, badly named, outside `root`, or holds what vLLM does not serve is left
    out and listed in `refused`. Raises PosteriorError when there is nothing else.
    """
    served = {base.id: Served(base.id)}
    refused: dict[str, str] = {}
    numbers = count(1)
    for folder in [root / only] if only is not None else _folders(root):
        try:
            entries = _entries(folder, root, base, served, numbers, particles, cache)
        except (PosteriorError, OSError) as error:
            refused[folder.name] = str(error)
        else:
            served |= entries
    registry = Registry(base, served, refused)
    registry.check(root)
    return registry


def _folders(root: Path) -> list[Path]:
    """The posterior folders in `root`; one whose replacement was interrupted is repaired. Raises PosteriorError."""
    if not root.is_dir():
        raise PosteriorError(f"the posteriors folder {root} does not exist; name one with --posteriors")
    for target in atomic.moved_away(root):
        atomic.recover(target)
    return sorted(path.parent for path in root.glob("*/posterior.json"))


def _entries(
    folder: Path, root: Path, base: Base, known: Container[str], numbers: Iterator[int], particles: int, cache: Path
) -> dict[str, Served]:
    """The model names of one folder. Raises PosteriorError if it cannot be served."""
    if not folder.resolve().is_relative_to(root.resolve()):
        raise PosteriorError(f"the posterior {folder} lies outside {root}; copy it into that folder")
    if not NAME.fullmatch(folder.name):
        raise PosteriorError(
            f"the folder {folder.name!r} cannot be a model name; use letters, digits, '.', '_' and '-'"
        )
    posterior = artefact.load(folder)
    posterior.check_base(base.hash)
    servable.check_modules(f"the posterior {posterior.name!r}", lora.modules(posterior.map_dir))
    entry = _serve(posterior, numbers, particles, cache)
    map_only = Served(f"{entry.name}/map", posterior, entry.map)
    for name in (entry.name, map_only.name):
        if name in known:
            raise PosteriorError(f"two models would be named {name!r}; rename the folder {folder}")
    return {entry.name: entry, map_only.name: map_only}


def _serve(posterior: Posterior, numbers: Iterator[int], particles: int, cache: Path) -> Served:
    """The model name of a posterior that mixes its particles; its adapters are written where they are not there yet."""
    wanted = len(posterior.weights) if posterior.family == "particles" else particles
    paths = posterior.adapters(wanted, cache / "draws")
    label = _label(posterior)
    return Served(
        name=posterior.name,
        posterior=posterior,
        map=Adapter(label, posterior.map_dir, next(numbers)),
        particles=tuple(Adapter(f"{label}/{path.name}", path, next(numbers)) for path in paths),
        weights=posterior.mixture(wanted),
    )


def _label(posterior: Posterior) -> str:
    return f"{posterior.name}@{posterior.hash[:HASH_DIGITS]}"
