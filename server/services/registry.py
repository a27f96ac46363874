"""The posteriors of one folder, verified, with their particles on disk and their names in the API.

A registry is a value. When a posterior is loaded or an alias moves, another registry takes its place at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
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
MAP = "/map"  # ends the name of theta* alone


class Users:
    """The requests that are being answered by one loaded posterior."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> Callable[[], None]:
        """Count one request; returns what ends it."""
        self.count += 1
        self._idle.clear()
        return self._leave

    def _leave(self) -> None:
        self.count -= 1
        if self.count == 0:
            self._idle.set()

    async def none(self) -> None:
        """Wait until there is no request."""
        await self._idle.wait()


@dataclass(frozen=True)
class Served:
    """One model name of the API, which may be an alias.

    `posterior` and `map` are None for the bare base; `particles`, the heaviest first, is empty for it and for
    "<name>/map". `linearized`: whether a worker computes that predictive. `users`: of the posterior, whatever it is
    called.
    """

    name: str
    posterior: Posterior | None = None
    map: Adapter | None = None
    particles: tuple[Adapter, ...] = ()
    weights: tuple[float, ...] = ()
    linearized: bool = True
    users: Users = field(default_factory=Users, compare=False, repr=False)

    @property
    def stem(self) -> str:
        """The name that stands for this one in the rights of a key: that of the posterior or alias."""
        return self.name.removesuffix(MAP)

    @property
    def key(self) -> str:
        """What the engine calls it. It belongs to this posterior alone, whatever name or alias leads there."""
        if self.posterior is None:
            return self.name
        return f"{self.posterior.name}{'' if self.particles else MAP}@{self.posterior.hash[:HASH_DIGITS]}"

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
        return tuple(name for name in self.posterior.predictives if self.linearized or name != "linearized")

    @property
    def scoring(self) -> Scoring:
        """How candidates are scored: as the posterior was fitted, the bare base by the defaults."""
        return Scoring() if self.posterior is None else self.posterior.task.scoring


@dataclass(frozen=True)
class Registry:
    """Everything the server serves, by model name; and why a folder or an alias is not served, by its name.

    others: loaded posteriors to which no name leads, as another version or an alias has theirs. They have ids only.
    """

    base: Base
    served: Mapping[str, Served]
    refused: Mapping[str, str] = field(default_factory=dict)
    others: tuple[Served, ...] = ()

    def find(self, name: str) -> Served | None:
        """The model with this name or id."""
        found = self.served.get(name) or self.served.get(name.partition("@")[0])
        if found is not None and name in (found.name, found.id):
            return found
        return next((entry for entry in self.others if entry.id == name), None)

    @property
    def entries(self) -> list[Served]:
        """Every model."""
        return [*self.served.values(), *self.others]

    @property
    def posteriors(self) -> list[Posterior]:
        """Each posterior once, in order of its name."""
        found = {each.key: each.posterior for each in self.entries if each.posterior is not None and each.particles}
        return list(found.values())

    @property
    def adapters(self) -> list[Adapter]:
        """Each adapter once."""
        every = (adapter for entry in self.entries for adapter in adapters_of(entry))
        return list(dict.fromkeys(every))

    @property
    def public(self) -> dict[str, Adapter]:
        """What generates text with one adapter, by the engine's name of it."""
        return {entry.key: entry.map for entry in self.entries if entry.map is not None}

    @property
    def laplace(self) -> dict[str, tuple[Path, str]]:
        """Folder and hash of each posterior that the linearised predictive is served of, by the engine's name of it."""
        return {
            each.key: (each.posterior.path, each.posterior.hash)
            for each in self.entries
            if each.posterior is not None and "linearized" in each.predictives
        }

    @property
    def modules(self) -> set[str]:
        """The modules that adapters change."""
        return {name for posterior in self.posteriors for name in lora.modules(posterior.map_dir)}

    @property
    def rank(self) -> int:
        """The largest rank of all adapters."""
        return max(servable.rank(lora.read_config(posterior.map_dir)) for posterior in self.posteriors)

    def only(self, names: Container[str]) -> Registry:
        """The models of these names, where a posterior's or an alias's name stands for its MAP too."""
        kept = {name: entry for name, entry in self.served.items() if name in names or entry.stem in names}
        others = tuple(entry for entry in self.others if entry.name in names or entry.stem in names)
        return Registry(self.base, kept, others=others)

    def describe(self, metrics: Metrics) -> None:
        """Set the gauges that say what is served."""
        metrics.refused.set(len(self.refused))
        metrics.info.clear()
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


Version = tuple[Served, Served]  # a loaded posterior: its mixture, and theta* alone


def adapters_of(entry: Served) -> tuple[Adapter, ...]:
    """The adapters of one model: theta* and the particles."""
    return () if entry.map is None else (entry.map, *entry.particles)


def composed(
    base: Base,
    versions: Iterable[Version],
    aliases: Mapping[str, str] | None = None,
    refused: Mapping[str, str] | None = None,
) -> Registry:
    """The registry of loaded posteriors.

    Args:
        versions: a name without an alias leads to the last one of that name.
        aliases: the label of a posterior by the alias. Of one that is not loaded neither the alias nor a posterior of
            the same name is served by that name.
    """
    aliases = aliases or {}
    versions = list(versions)
    by_label = {mixture.label: (mixture, point) for mixture, point in versions}
    by_name = {mixture.name: (mixture, point) for mixture, point in versions}
    served = {base.id: Served(base.id)}
    missing = {}
    for name in sorted({*by_name, *aliases}):
        found = by_label.get(aliases[name]) if name in aliases else by_name[name]
        if found is None:
            missing[name] = f"the alias leads to {aliases[name]}, which is not loaded; load it, or move the alias"
            continue
        mixture, point = found
        served |= {name: replace(mixture, name=name), f"{name}{MAP}": replace(point, name=f"{name}{MAP}")}
    known = {entry.id for entry in served.values()}
    others = tuple(entry for version in versions for entry in version if entry.id not in known)
    return Registry(base, served, {**(refused or {}), **missing}, others)


@dataclass(frozen=True)
class Source:
    """Where posteriors come from: the folders in `root`, of one base, with `particles` samples of each Laplace
    posterior in `cache`. linearized: whether a worker computes that predictive. numbers: of adapters; none is given
    twice, since vLLM knows an adapter by its number."""

    root: Path
    base: Base
    particles: int
    cache: Path
    linearized: bool = True
    numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def all(self, only: str | None = None) -> Registry:
        """As `load`."""
        versions: list[Version] = []
        refused: dict[str, str] = {}
        for folder in [self.root / only] if only is not None else _folders(self.root):
            try:
                versions.append(self.one(folder.name))
            except (PosteriorError, OSError) as error:
                refused[folder.name] = str(error)
        registry = composed(self.base, versions, refused=refused)
        registry.check(self.root)
        return registry

    def one(self, name: str) -> Version:
        """The posterior of one folder, verified; its adapters are written where they are not there yet.

        Raises PosteriorError if it cannot be served, OSError if it cannot be read.
        """
        folder = self.root / name
        if not folder.resolve().is_relative_to(self.root.resolve()):
            raise PosteriorError(f"the posterior {folder} lies outside {self.root}; copy it into that folder")
        if not NAME.fullmatch(name):
            raise PosteriorError(f"the folder {name!r} cannot be a model name; use letters, digits, '.', '_' and '-'")
        if name == self.base.id:
            raise PosteriorError(f"two models would be named {name!r}; rename the folder {folder}")
        if folder.resolve().name != name:
            raise PosteriorError(f"the posterior {folder} is a link to another name; give it an alias instead")
        posterior = artefact.load(folder)
        posterior.check_base(self.base.hash)
        servable.check_modules(f"the posterior {posterior.name!r}", lora.modules(posterior.map_dir))
        wanted = len(posterior.weights) if posterior.family == "particles" else self.particles
        paths = posterior.adapters(wanted, self.cache / "draws")
        label, users = _label(posterior), Users()
        theta = Adapter(label, posterior.map_dir, next(self.numbers))
        particles = tuple(Adapter(f"{label}/{path.name}", path, next(self.numbers)) for path in paths)
        mixture = Served(name, posterior, theta, particles, posterior.mixture(wanted), self.linearized, users)
        return mixture, Served(f"{name}{MAP}", posterior, theta, users=users)


def load(root: Path, base: Base, *, particles: int, cache: Path, only: str | None = None) -> Registry:
    """All that is served of the posterior folders in `root`, or only the one of this name, each verified.

    A folder that is damaged, of another base, badly named, outside `root`, or holds what vLLM does not serve is left
    out and listed in `refused`. Raises PosteriorError when there is nothing else.
    """
    return Source(root, base, particles, cache).all(only)


def _folders(root: Path) -> list[Path]:
    """The posterior folders in `root`; one whose replacement was interrupted is repaired. Raises PosteriorError."""
    if not root.is_dir():
        raise PosteriorError(f"the posteriors folder {root} does not exist; name one with --posteriors")
    for target in atomic.moved_away(root):
        atomic.recover(target)
    return sorted(path.parent for path in root.glob("*/posterior.json"))


def _label(posterior: Posterior) -> str:
    return f"{posterior.name}@{posterior.hash[:HASH_DIGITS]}"
