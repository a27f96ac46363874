"""How wide a Laplace posterior's draws may be.

The linearised predictive is the better one (Immer et al. 2021, arXiv 2008.08217): its Gaussian was fitted to the
linearised network. A draw moves all matrices at once, by the prior's whole width where the data say nothing, and there
the network is not linear: a mixture of such draws is less confident, and less often right. So draws are
theta* + w P^-1/2 eps, with the w of (0, 1] whose mixture is nearest to the linearised predictive: the least mean
KL(linearised || mixture). Labels are not looked at, and where the network is as good as linear w is 1.

It is measured on rows that theta* was not fitted to, as answers are asked for: on the training rows themselves theta*
is surer than anywhere else, and less width makes up for it. Such rows are made of the training rows, the first half of
one and the second half of the next; only their inputs matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from tqdm import tqdm

from posterior.data.examples import Examples, batches
from posterior.laplace import blockwise
from posterior.laplace.linearized import predictives
from posterior.likelihood.scores import scores
from posterior.models import lora

ROWS, DRAWS = 32, 8  # what the mixture is measured with
TOLERANCE = 0.03  # of w, about as well as so few draws tell it


def fit(
    model: Any,
    covariance: blockwise.Covariance,
    curvature: blockwise.Curvature,
    precision: Mapping[str, float],
    examples: Examples,
    batch_size: int,
    seed: int = 0,
) -> float:
    """The width w of draws around the adapter as it is, which stays. `covariance` is what the linearised predictive
    uses, `curvature` and `precision` are what draws are made of; the seed is that of the draws."""
    model.eval().requires_grad_(False)
    matrices = lora.matrices(model)
    device = next(iter(matrices.values())).weight.device
    covariance = covariance.to(device)
    step = max(1, len(examples) // ROWS)
    held = [batch.to(device) for _, batch in batches(spliced(examples)[::step][:ROWS], batch_size)]
    targets = [
        torch.stack([each.probability for each in predictives(model, matrices, covariance, batch)]) for batch in held
    ]
    mean, generator = lora.get(model), torch.Generator().manual_seed(seed)
    draws = [blockwise.sample(curvature, precision, mean, generator) for _ in range(DRAWS)]

    def divergence(width: float) -> float:
        """Summed over the rows, in nats."""
        found: list[list[Tensor]] = [[] for _ in held]
        for draw in draws:
            lora.put(model, {name: value + width * (draw[name] - value) for name, value in mean.items()})
            with torch.no_grad():
                for kept, batch in zip(found, held, strict=True):
                    kept.append(scores(model, batch).double().softmax(1).cpu())
            bar.update()
        pairs = zip(targets, found, strict=True)
        return sum(float(torch.special.xlogy(p, p / torch.stack(q).mean(0)).sum()) for p, q in pairs)

    with tqdm(desc="width of draws", unit="draw", leave=False) as bar:
        try:
            best = minimize_scalar(divergence, bounds=(0, 1), method="bounded", options={"xatol": TOLERANCE})
        finally:
            lora.put(model, mean)
    return float(best.x)


def spliced(examples: Examples) -> Examples:
    """Each example's first half of the prompt with the second half, and so the template's end, of the next one's."""
    pairs = zip(examples, [*examples[1:], examples[0]], strict=True)
    rows = [
        replace(one, prompt=one.prompt[: len(one.prompt) // 2] + other.prompt[len(other.prompt) // 2 :])
        for one, other in pairs
    ]
    return replace(examples, rows=rows)
