"""Scores of a predictive against true labels, with bootstrap intervals. Probabilities [N, C], labels [N]; NLL in
nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from posterior.errors import PosteriorError

BINS = 15  # of the calibration errors, as in most of the literature
COVERAGE = 0.9  # of prediction sets that are reported


def accuracy(p: Tensor, y: Tensor) -> float:
    return float((p.argmax(1) == y).double().mean())


def nll(p: Tensor, y: Tensor) -> float:
    """Mean negative log-probability of the true label. A zero probability gives inf: it is not clipped away."""
    return float(-p.gather(1, y[:, None]).log().mean())


def brier(p: Tensor, y: Tensor) -> float:
    """Mean of sum_c (p_c - 1[c = y])^2, between 0 and 2 (Brier 1950)."""
    return float((p - torch.nn.functional.one_hot(y, p.shape[1])).square().sum(1).mean())


def ece(p: Tensor, y: Tensor, bins: int = BINS) -> float:
    """Expected calibration error of the top answer: bins of equal width, weighted by size (Guo et al. 2017)."""
    return right_ece(*_top(p, y), bins)


def right_ece(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """The same of confidences [N] in answers that are right or not [N]."""
    count, mean, share = reliability_bins(confidence, right, bins)
    return float((count * (mean - share).abs()).nansum() / len(right))


def calibrated_ece(p: Tensor, bins: int = BINS, draws: int = 200, seed: int = 0) -> float:
    """The ECE to be expected if these probabilities were exactly right: that of labels drawn from them. With few rows
    it is far from zero, and no model can be told to be better."""
    labels = torch.multinomial(p, draws, replacement=True, generator=torch.Generator().manual_seed(seed))
    return sum(ece(p, y, bins) for y in labels.T) / draws


def adaptive_ece(p: Tensor, y: Tensor, bins: int = BINS) -> float:
    """The same with bins of equal mass: by confidence, N / `bins` rows each or one more (Nixon et al. 2019)."""
    confidence, right = _falling(*_top(p, y))
    index = torch.arange(len(y)) * bins // len(y)
    return float(torch.zeros(bins).to(p).index_add(0, index, confidence - right).abs().sum() / len(y))


def signed_gap(p: Tensor, y: Tensor) -> float:
    """Mean confidence minus accuracy: positive is over-confident, negative under-confident."""
    return float(p.max(1).values.mean()) - accuracy(p, y)


def auroc(p: Tensor, y: Tensor) -> float:
    """Probability that a right answer has more confidence than a wrong one, ties half; nan without either."""
    return right_auroc(*_top(p, y))


def right_auroc(confidence: Tensor, right: Tensor) -> float:
    """The same of confidences [N] in answers that are right or not [N]."""
    return _above(confidence[right], confidence[~right])


def aurc(p: Tensor, y: Tensor) -> float:
    """Area under the risk-coverage curve: (1/N) sum_k (share of wrong answers among the k most confident), k = 1..N
    (Geifman et al. 2019); 0 without mistakes."""
    return right_aurc(*_top(p, y))


def right_aurc(confidence: Tensor, right: Tensor) -> float:
    """The same of confidences [N] in answers that are right or not [N]."""
    return float(_risk_coverage(confidence, right).mean())


def right_nll(confidence: Tensor, right: Tensor) -> float:
    """Mean negative log-probability of what came true, in nats: that an answer is right, or that it is not."""
    return float(-torch.where(right, confidence, 1 - confidence).log().mean())


def right_brier(confidence: Tensor, right: Tensor) -> float:
    """Mean of (confidence - 1[right])^2, between 0 and 1."""
    return float((confidence - right.double()).square().mean())


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "nll": nll,
    "brier": brier,
    "ece": ece,
    "adaptive_ece": adaptive_ece,
    "gap": signed_gap,
    "auroc": auroc,
    "aurc": aurc,
}
# Of the probability that an answer is right, confidence [N] and right [N], where the answers are no choice among some.
RIGHT_METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": lambda _, right: float(right.double().mean()),
    "nll": right_nll,
    "brier": right_brier,
    "ece": right_ece,
    "gap": lambda confidence, right: float(confidence.mean() - right.double().mean()),
    "auroc": right_auroc,
    "aurc": right_aurc,
}


@dataclass(frozen=True)
class Estimate:
    """A value on the whole test set and its central 95 % bootstrap interval over test rows; nan where undefined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "-" if math.isnan(self.value) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def check(p: Tensor) -> None:
    """Raises PosteriorError when a probability is nan or infinite."""
    if not bool(torch.isfinite(p).all()):
        raise PosteriorError("the predictive gave probabilities that are not finite; try float32")


RESAMPLES = 1000


def estimate(
    p: Tensor,
    y: Tensor,
    *,
    draws: int | None = None,
    seed: int = 0,
    metrics: Mapping[str, Callable[[Tensor, Tensor], float]] = METRICS,
) -> dict[str, Estimate]:
    """All metrics, or these, with bootstrap intervals of so many resamples (None: RESAMPLES); the same seed resamples
    the same rows, so methods are compared on equal draws. Resamples in which a metric is undefined do not count."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(y), (draws or RESAMPLES, len(y)), generator=generator)
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    result = {}
    for name, metric in metrics.items():
        resampled = torch.tensor([metric(p[pick], y[pick]) for pick in picks], dtype=torch.float64)
        low, high = resampled.nanquantile(
            levels, interpolation="nearest"
        ).tolist()  # there is no way between two of inf
        result[name] = Estimate(metric(p, y), low, high)
    return result


def reliability(p: Tensor, y: Tensor, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, mean confidence and accuracy, each [bins], of bins (lower, upper] of equal width; nan where empty."""
    return reliability_bins(*_top(p, y), bins)


def reliability_bins(confidence: Tensor, right: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the confidences [N] in bins of equal width, each with its upper edge: how many, their mean, and the share of
    right answers [bins]; nan where there are none."""
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    columns = torch.stack([torch.ones_like(confidence), confidence, right.to(confidence)], 1)
    count, *sums = torch.zeros(bins, 3).to(confidence).index_add(0, index, columns).T
    return count, sums[0] / count, sums[1] / count


def risk_coverage(p: Tensor, y: Tensor) -> Tensor:
    """Share [N] of wrong answers among the k most confident ones, k = 1..N; rows that tie come in no order."""
    return _risk_coverage(*_top(p, y))


def _risk_coverage(confidence: Tensor, right: Tensor) -> Tensor:
    _, share = _falling(confidence, right)
    return (1 - share).cumsum(0) / torch.arange(1, len(right) + 1)


def ood_auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that a row of another distribution [M] has a larger score than one of the test's [N], ties half."""
    return _above(outside, inside)


def best_temperature(scores: Tensor, y: Tensor) -> float:
    """The T > 0 that minimises the NLL of softmax(scores / T) (Guo et al. 2017)."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: nll((scores / torch.tensor(log_t).exp()).softmax(1), y), bounds=(-4, 4), method="bounded"
    )
    return float(torch.tensor(found.x).exp())


def _top(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Confidences [N] of the most probable answers, and whether these are right [N]."""
    confidence, predicted = p.max(1)
    return confidence, predicted == y


def _falling(confidence: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Confidences [N], the highest first, and whether each answer is right [N]: rows that tie share their mean."""
    levels, level, count = confidence.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    share = torch.zeros_like(levels).index_add(0, level, right.to(levels)) / count
    return levels.repeat_interleave(count).flip(0), share.repeat_interleave(count).flip(0)


def _above(high: Tensor, low: Tensor) -> float:
    """P(high > low) + P(high = low) / 2 from mid-ranks (Mann & Whitney 1947): the area under the ROC curve."""
    from scipy.stats import rankdata  # a tenth of sklearn.metrics.roc_auc_score's time, of a thousand resamples

    if not len(high) or not len(low):
        return math.nan
    ranks = rankdata(torch.cat([high, low]).numpy())[: len(high)]
    return float((ranks.mean() - (len(high) + 1) / 2) / len(low))
