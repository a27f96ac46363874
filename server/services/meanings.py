"""Which of a prompt's samples mean the same, by the way that the request names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from posterior.meaning.exact import exact
from posterior.meaning.greedy import Groups
from server.errors import Refused
from server.services import judge
from server.services.options import MAX_COMPARISONS, MeaningName
from server.services.predictive import Service


def check(service: Service, name: MeaningName, prompts: int, texts: int) -> None:
    """Raises Refused for a way that this server does not have, or for more comparisons of `texts` for each prompt than
    a request may ask for; Unavailable while the model is away."""
    if name in ("embedding", "nli"):
        if service.comparer is None or name not in service.comparer.names:
            raise Refused(
                f"the meaning {name!r} needs a model that this server was not started with: give `posterior serve` "
                f"--meaning-{name} FOLDER, or ask for 'exact' or 'judge'",
                "uncertainty.meaning",
            )
        service.comparer.check()
    comparisons = prompts * texts * (texts - 1) // 2
    if name in ("nli", "judge") and comparisons > MAX_COMPARISONS:
        raise Refused(
            f"{prompts} prompts x {texts} texts x {texts - 1} / 2 are {comparisons} comparisons; one request may have "
            f"{MAX_COMPARISONS}: send fewer prompts, or ask for fewer samples",
            "uncertainty.samples",
        )


def identity(service: Service, name: MeaningName) -> str:
    """What a calibration calls the way: by its model too, if it has one of its own."""
    return name if service.comparer is None or name not in service.comparer.names else service.comparer.identity(name)


async def grouped(service: Service, name: MeaningName, question: str, texts: Sequence[str]) -> list[int]:
    """The number of each text's meaning, from 0 in the order in which they first appear.

    Raises RequestError.
    """
    if name == "exact":
        return exact(texts)
    same, groups = _comparison(service, name), Groups(texts)
    while groups.others:
        groups.join(await same(question, groups.first, groups.others))
    return groups.numbers


def _comparison(service: Service, name: MeaningName) -> Callable[[str, str, Sequence[str]], Awaitable[list[bool]]]:
    """As posterior.meaning.Comparison."""
    if name == "judge":
        return partial(judge.same, service)
    if service.comparer is None:
        raise RuntimeError(f"there is no model for {name!r}")
    return partial(service.comparer.same, name)
