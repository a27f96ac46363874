"""`--method dropout`: MC dropout (Gal & Ghahramani 2016) as particles: one adapter trained with dropout on A's input,
and K masks of that input.

A particle keeps its mask for all rows and positions, so it is an ordinary adapter, A_k = A diag(mask_k) / (1 - p);
usual MC dropout draws a mask for every position.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from posterior.models import lora
from posterior.particles.ensemble import INIT, Init, train_member
from posterior.settings import SettingError, setting
from posterior.training.method import LORA, Job, Result, TrainedParticles


@dataclass(frozen=True, kw_only=True)
class Dropout(TrainedParticles):
    """One adapter under random masks."""

    init: Init = setting("random", INIT, group=LORA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout == 0:
            raise SettingError("the method dropout needs a {dropout} above 0, for example 0.1")

    def fit(self, job: Job) -> Result:
        """Train one adapter with dropout p, then draw the masks; map/ holds the adapter without one."""
        with tqdm(total=self.training.total_steps(len(job.examples)), desc="training", unit="step") as bar:
            trainer = train_member(self, self.init, job, 0, bar)
        theta = lora.get(job.model)
        record = {
            "method": "dropout",
            "probability": self.dropout,
            "training": asdict(self.training),
            "log_likelihood": job.log_likelihood(self.batch_size),
            "history": trainer.history,
        }
        thetas = [masked(theta, self.dropout, self.member_seed(index)) for index in range(self.particles)]
        return self.result(thetas, theta, record, self.prior)


def masked(theta: lora.Theta, probability: float, seed: int) -> lora.Theta:
    """theta with each input of each A dropped with this probability, and the others scaled up by 1 / (1 - p)."""
    generator = torch.Generator().manual_seed(seed)
    keep = 1 - probability
    return {
        name: value * (torch.rand(value.shape[1], generator=generator) < keep).to(value) / keep
        if name.endswith(".A")
        else value.clone()
        for name, value in theta.items()
    }
