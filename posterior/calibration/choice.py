"""Which predictive is served by default, chosen by held-out rows: what `posterior calibrate` compared, and found.

It lies in calibration/served.json beside the records.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from posterior.calibration.metrics import Estimate
from posterior.calibration.records import CHOICE, FOLDER, PredictiveName
from posterior.calibration.scalers import Method, Part
from posterior.errors import PosteriorError
from posterior.files import atomic, objects


class Compared(Part):
    """One predictive with one calibrator. nll: cross-fitted, nats; excess: of it over the least one; evaluations: of
    the model for an answer."""

    predictive: PredictiveName
    method: Method
    nll: Estimate
    excess: float
    error: float
    evaluations: int

    @property
    def close(self) -> bool:
        """Whether its NLL is within one standard error of the least."""
        return self.excess <= self.error


class Choice(Part):
    """The winner is the cheapest predictive that comes close to the least NLL, with the calibrator that suits it best.
    data: hash of the n rows; posterior: the hash of what they were asked."""

    format: Literal[1] = 1
    posterior: str
    predictive: PredictiveName
    method: Method
    n: Annotated[int, Field(ge=1)]
    data: str
    compared: tuple[Compared, ...]

    @classmethod
    def of(cls, compared: tuple[Compared, ...], *, posterior: str, n: int, data: str) -> Choice:
        """The choice among these."""
        best = min((each for each in compared if each.close), key=lambda each: (each.evaluations, each.nll.value))
        return cls(
            posterior=posterior, predictive=best.predictive, method=best.method, n=n, data=data, compared=compared
        )


def save(folder: Path, made: Choice) -> Path:
    """Write it into a posterior folder, atomically. Raises PosteriorError."""
    path = folder / FOLDER / CHOICE
    atomic.write(path, (made.model_dump_json(indent=1) + "\n").encode())
    return path


def load(folder: Path, *, posterior: str, predictives: tuple[PredictiveName, ...]) -> Choice | None:
    """The choice of a posterior folder, if there is one. Raises PosteriorError with one clear line for a bad one."""
    path = folder / FOLDER / CHOICE
    if not path.exists():
        return None
    if not path.resolve().is_relative_to(folder.resolve()):
        raise PosteriorError(f"{path} leads outside the folder; refused")
    try:
        found = Choice.model_validate_json(json.dumps(objects.read(path)))
    except (ValidationError, OSError, ValueError):
        raise PosteriorError(f"{path} is not what `posterior calibrate` wrote; {_AGAIN}") from None
    if found.posterior != posterior or found.predictive not in predictives:
        raise PosteriorError(f"{path} chooses for another posterior; {_AGAIN}")
    return found


_AGAIN = "delete it, or run `posterior calibrate` again"
