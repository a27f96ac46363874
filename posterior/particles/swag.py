"""`--method swag`: a Gaussian from the path of the optimiser (Maddox et al. 2019, arXiv 1902.02476; on LoRA: Onal et
al. 2024, arXiv 2405.03425).

In the second half of the steps the learning rate stays where it is, and snapshots theta_s are taken. With their mean m,
their variances v and their deviations D_s = theta_s - m (S of them) the posterior is
    N(m, diag(v) / 2 + (1 / (2 (S - 1))) sum_s D_s D_s^T).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from posterior.data.examples import Batch, Examples
from posterior.likelihood.stacked import stack
from posterior.models import lora
from posterior.particles.ensemble import INIT, Init
from posterior.settings import SettingError, setting
from posterior.training.map import Trainer, Training
from posterior.training.method import LORA, Job, Result, TrainedParticles
from posterior.training.prior import prior_precision

START = 0.5  # share of the steps before the first snapshot
SNAPSHOTS = 20  # the rank of the covariance, at most


class SwagTrainer(Trainer):
    """A Trainer whose learning rate stops falling at START, and who then takes snapshots at even distances."""

    def __init__(self, model: nn.Module, examples: Examples, precision: Mapping[str, float], training: Training):
        super().__init__(model, examples, precision, training)
        self.snapshots: list[lora.Theta] = []

    @property
    def first(self) -> int:
        return math.floor(START * self.total)

    def rate(self) -> float:
        return super().rate() if self.step < self.first else self.training.learning_rate * (1 - START)

    def update(self, batch: Batch) -> float:
        value = super().update(batch)
        interval = math.ceil((self.total - self.first) / SNAPSHOTS)
        if self.step > self.first and (self.total - self.step) % interval == 0:
            self.snapshots.append(lora.get(self.model))
        return value

    def state(self) -> dict[str, Tensor]:
        taken = {f"snapshot/{i}/{name}": x for i, one in enumerate(self.snapshots) for name, x in one.items()}
        return super().state() | taken

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        super().restore(tensors)
        count = sum(key.startswith("snapshot/") for key in tensors) // len(self.matrices)
        self.snapshots = [
            {name: tensors[f"snapshot/{i}/{name}"].to(module.weight) for name, module in self.matrices.items()}
            for i in range(count)
        ]


@dataclass(frozen=True, kw_only=True)
class Swag(TrainedParticles):
    """Draws of a Gaussian from the path of the optimiser."""

    init: Init = setting("random", INIT, group=LORA)

    def fit(self, job: Job) -> Result:
        """K draws from the Gaussian; map/ holds its mean. An interrupted fit goes on."""
        precision = prior_precision(lora.get(job.model), self.prior_precision)
        trainer = SwagTrainer(job.model, job.examples, precision, self.training)
        if trainer.total - trainer.first < 2:
            raise SettingError(
                "swag needs at least 2 snapshots, but trains {total} steps; raise {epochs}", total=trainer.total
            )
        job.checkpoint.complete(trainer)
        mean = {name: value.mean(0) for name, value in stack(trainer.snapshots).items()}
        lora.put(job.model, mean)
        record = {
            "method": "swag",
            "snapshots": len(trainer.snapshots),
            "training": asdict(self.training),
            "log_likelihood": job.log_likelihood(self.batch_size),
            "history": trainer.history,
        }
        thetas = [sample(trainer.snapshots, self.member_seed(index)) for index in range(self.particles)]
        return self.result(thetas, mean, record, self.prior)


def sample(snapshots: Sequence[lora.Theta], seed: int) -> lora.Theta:
    """A draw. The deviations' coefficients are shared by all matrices: the covariance couples them."""
    generator = torch.Generator().manual_seed(seed)
    count = len(snapshots)
    coefficients = torch.randn(count, generator=generator) / math.sqrt(2 * (count - 1))
    result: lora.Theta = {}
    for name, values in stack(snapshots).items():
        mean = values.mean(0)
        own = torch.randn(mean.shape, generator=generator).to(mean) * (values.var(0, unbiased=False) / 2).sqrt()
        result[name] = mean + own + torch.einsum("s,s...->...", coefficients.to(mean), values - mean)
    return result
