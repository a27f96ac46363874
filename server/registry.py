"""The posteriors of one folder, verified, with their particles on disk and their names in the API."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from posterior import artefact
from posterior.arguments import NAME
from posterior.artefact import Posterior
from posterior.base import Base
from posterior.errors import PosteriorError
from posterior.task import Scores, Task
from server.engine import Adapter
from server.schemas import PredictiveName

HASH_DIGITS = 12


@dataclass(frozen=True)
class Served:
    """One model name of the API.

    `posterior` and `map` are None for the bare base; `particles` is empty for it and for "<name>/map".
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
    def predictives(self) -> tuple[PredictiveName, ...]:
        """The predictives this name can give for candidate answers, its default first."""
        if self.posterior is None or not self.particles:
            return ("map",)
        return ("linearized", "mixture", "map") if self.posterior.family == "laplace" else ("mixture", "map")

    @property
    def scoring(self) -> tuple[Scores, float]:
        """How a candidate of several tokens is scored, and the scale of the scores: as the posterior was fitted, the
        bare base by the defaults."""
        task = Task if self.posterior is None else self.posterior.task
        return task.scores, task.scale


@dataclass(frozen=True)
class Registry:
    """Everything the server serves, by model name."""

    base: Base
    served: Mapping[str, Served]

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


def load(root: Path, base: Base, *, particles: int, cache: Path) -> Registry:
    """Verify every posterior folder in `root` and write `particles` samples of each Laplace posterior under `cache`.

    Raises PosteriorError for a folder that is damaged, of another base, badly named or outside `root`, and for none.
    """
    served = {base.id: Served(base.id)}
    numbers = count(1)
    for folder in _folders(root):
        posterior = artefact.load(folder)
        posterior.check_base(base.hash)
        _check_targets(posterior)
        entry = _serve(posterior, numbers, particles, cache)
        for name, item in {
            entry.name: entry,
            f"{entry.name}/map": Served(f"{entry.name}/map", posterior, entry.map),
        }.items():
            if name in served:
                raise PosteriorError(f"two models would be named {name!r}; rename the folder {folder}")
            served[name] = item
    if len(served) == 1:
        raise PosteriorError(
            f"no posterior in {root}: expected folders that hold a posterior.json; `posterior fit` makes one"
        )
    return Registry(base, served)


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise PosteriorError(f"the posteriors folder {root} does not exist; name one with --posteriors")
    inside = root.resolve()
    folders = sorted(path.parent for path in root.glob("*/posterior.json"))
    for folder in folders:
        if not folder.resolve().is_relative_to(inside):
            raise PosteriorError(f"the posterior {folder} lies outside {root}; copy it into that folder")
        if not NAME.fullmatch(folder.name):
            raise PosteriorError(
                f"the folder {folder.name!r} cannot be a model name; use letters, digits, '.', '_' and '-'"
            )
    return folders


def _serve(posterior: Posterior, numbers: Iterator[int], particles: int, cache: Path) -> Served:
    wanted = len(posterior.weights) if posterior.family == "particles" else particles
    paths = posterior.adapters(wanted, cache / "adapters")
    label = _label(posterior)
    weights = tuple(posterior.weights) if posterior.family == "particles" else (1 / wanted,) * wanted
    return Served(
        name=posterior.name,
        posterior=posterior,
        map=Adapter(label, posterior.map_dir, next(numbers)),
        particles=tuple(Adapter(f"{label}/{k:03d}", path, next(numbers)) for k, path in enumerate(paths)),
        weights=weights,
    )


def _check_targets(posterior: Posterior) -> None:
    """Raises PosteriorError for adapters of the vocabulary, which vLLM's prompt log-probabilities would ignore."""
    found = {"lm_head", "embed_tokens"} & {
        *posterior.lora["target_modules"],
        *(posterior.lora.get("modules_to_save") or ()),
    }
    if found:
        raise PosteriorError(
            f"{posterior.name!r} adapts {', '.join(sorted(found))}; only adapters inside the layers are served: "
            "fit it with other --targets"
        )


def _label(posterior: Posterior) -> str:
    return f"{posterior.name}@{posterior.hash[:HASH_DIGITS]}"
