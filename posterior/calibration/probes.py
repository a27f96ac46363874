"""Probes: a few rows and what the fitted posterior says of them, so that a server can compare what it serves.

They are made with transformers and peft (posterior/evaluation/probing.py) and lie in calibration/probes.json beside the
records, so that the posterior's hash does not cover them. The rows themselves are in the file: whoever can read the
folder can read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from posterior.calibration import signed
from posterior.calibration.records import FOLDER, PROBES, template_hash
from posterior.calibration.scalers import Part
from posterior.data.examples import Example, Examples, encode
from posterior.data.scoring import Scoring
from posterior.data.task import Task, Tokenizer
from posterior.errors import PosteriorError
from posterior.models.devices import Dtype

ROWS = 8  # of the probes that are made
PARTICLES = 8  # whose probabilities are kept, at most
MAX_TOKENS = 256  # of a row that becomes a probe
RESPONSE_TOKENS = 8  # of a text's response that are compared
# The largest difference of a probability that only rounding makes. float32: vLLM and transformers differ by less on a
# CPU (tests/server/test_hot_load.py). Half precision is derived, not measured: logits of about 16 are right to 2^-8 of
# that in bfloat16.
TOLERANCE: dict[Dtype, float] = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.1}

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Probe(Part):
    """One row. label: the number of its true candidate. probability: [1 + K][C], of theta* and of each particle, the
    heaviest first; linearized: [C], None where the posterior has no such predictive."""

    row: dict[str, Any]
    label: Annotated[int, Field(ge=0)]
    probability: tuple[tuple[Share, ...], ...]
    linearized: tuple[Share, ...] | None = None


class Probes(Part):
    """The probes of one posterior.

    dtype: of the base that computed them. draws: what drew the particles, None where the folder holds them. heldout:
    whether none of the rows is one that the posterior was fitted on.
    """

    format: Literal[1] = 1
    base: str
    posterior: str
    template: str
    dtype: Dtype
    draws: str | None
    heldout: bool
    rows: Annotated[tuple[Probe, ...], Field(min_length=1, max_length=64)]

    @property
    def particles(self) -> int:
        """How many of them each row has probabilities of."""
        return len(self.rows[0].probability) - 1

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        for probe in self.rows:
            widths = {len(each) for each in probe.probability} | {len(probe.linearized or probe.probability[0])}
            if len(probe.probability) != self.particles + 1 or len(widths) != 1 or probe.label >= widths.pop():
                raise ValueError("the probabilities of a row do not belong together")
        return self


def examples(task: Task, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]]) -> Examples:
    """The rows as tokens; of a text only the first tokens of its response. Raises PosteriorError."""
    found = encode(task, tokenizer, rows)
    return found if task.has_candidates else replace(found, rows=[_beginning(example) for example in found])


def _beginning(example: Example) -> Example:
    return replace(example, continuations=tuple(tokens[:RESPONSE_TOKENS] for tokens in example.continuations))


def probabilities(log_p: Tensor, lengths: Tensor, scoring: Scoring) -> Tensor:
    """What is compared, [..., C], of log p(candidate | prompt) [..., C] and the candidates' lengths [C]: each
    candidate's probability among them, or of a text's single one the mean of a token, exp(log p / length)."""
    if log_p.shape[-1] == 1:
        return (log_p / lengths).exp()
    return scoring.scores(log_p, lengths).softmax(-1)


def tolerance(*dtypes: Dtype) -> float:
    """How far two probabilities may lie apart that were computed in these dtypes."""
    return max(TOLERANCE[dtype] for dtype in dtypes)


def signed_gap(confidence: Sequence[float], right: Sequence[bool]) -> tuple[float, float]:
    """How much the mean confidence is above the share of right answers, and that in standard errors of a calibrated
    posterior: z = sum(confidence - right) / sqrt(sum(confidence (1 - confidence))) (Spiegelhalter 1986)."""
    p = torch.tensor(confidence, dtype=torch.float64)
    excess = p - torch.tensor(right, dtype=torch.float64)
    spread = float((p * (1 - p)).sum().sqrt())
    return float(excess.mean()), float(excess.sum()) / max(spread, 1e-9)


def save(folder: Path, made: Probes) -> Path:
    """Write them into a posterior folder, atomically, in place of earlier ones. Raises PosteriorError."""
    return signed.write(folder / FOLDER / PROBES, made.model_dump(mode="json"))


def load(folder: Path, *, base: str, posterior: str, task: Task) -> Probes | None:
    """Those of a posterior folder, verified; None where it has none. Raises PosteriorError for bad ones."""
    path = folder.resolve() / FOLDER / PROBES
    if not path.exists():
        return None
    found = signed.parsed(Probes, signed.read(path), path)
    if (found.base, found.posterior, found.template) != (base, posterior, template_hash(task)):
        raise PosteriorError(f"{path} is of another posterior; delete it, or run `posterior probe` again")
    return found
