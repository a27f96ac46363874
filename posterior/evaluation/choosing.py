"""The predictives of a posterior compared by held-out rows, each with every calibrator.

Of each row the loss is -log of the probability that its true answer gets from a calibrator which other rows made
(cross-fitting). A predictive comes close to the best if its mean loss exceeds the best one's by at most one standard
error of the difference (Breiman et al. 1984); of those that do, the cheapest is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posterior.calibration.choice import Compared
from posterior.calibration.measure import cross_fit, mean, usable
from posterior.calibration.metrics import check
from posterior.calibration.records import PredictiveName, QuestionKind
from posterior.calibration.scalers import FLOOR, Method
from posterior.errors import PosteriorError
from posterior.models.devices import Dtype


class Predicted(NamedTuple):
    """A predictive's probabilities [N, C] of the rows, the evaluations of the model that an answer takes, and the
    base's dtype."""

    probability: Tensor
    evaluations: int
    dtype: Dtype


def compare(
    predicted: Mapping[PredictiveName, Predicted],
    y: Tensor,
    kinds: Mapping[QuestionKind | None, Sequence[int]],
    counts: Sequence[int],
    methods: Sequence[Method],
) -> tuple[Compared, ...]:
    """Every predictive with every method that the rows allow. Raises PosteriorError where they allow none.

    Args:
        kinds: the rows of each calibration; those of "any" are all, and serve the rows that have no other.
        counts: how many answers each row has.
    """
    losses: dict[tuple[PredictiveName, Method], Tensor] = {}
    unsuited = PosteriorError("there is nothing to compare")
    for name, each in predicted.items():
        for method in methods:
            try:
                losses[name, method] = _loss(each.probability, y, kinds, counts, method)
            except PosteriorError as error:
                unsuited = error
    if not losses:
        raise unsuited
    best = min(losses.values(), key=lambda loss: float(loss.mean()))
    return tuple(
        Compared(
            predictive=name,
            method=method,
            nll=mean(loss),
            excess=float((loss - best).mean()),
            error=float((loss - best).std()) / math.sqrt(len(loss)),
            evaluations=predicted[name].evaluations,
        )
        for (name, method), loss in losses.items()
    )


def _loss(
    p: Tensor, y: Tensor, kinds: Mapping[QuestionKind | None, Sequence[int]], counts: Sequence[int], method: Method
) -> Tensor:
    """[N], in nats. Raises PosteriorError where a kind of question does not allow the method."""
    check(p)
    loss = torch.zeros(len(y), dtype=torch.float64)
    for part in sorted(map(list, kinds.values()), key=len, reverse=True):  # "any" first, if there is one
        widths = [counts[index] for index in part]
        own, truth = p[part, : max(widths)], y[part]
        usable(method, set(widths), own, truth)
        after, _ = cross_fit(own, truth, method=method, widths=widths)
        loss[part] = -after.gather(1, truth[:, None])[:, 0].clamp(min=FLOOR).log()
    return loss
