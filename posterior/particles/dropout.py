"""`--method dropout`: MC dropout (Gal & Ghahramani 2016) as particles: one adapter trained with dropout on A's input,
and K masks of that input.

A particle keeps its mask for all rows and positions, so it is an ordinary adapter, A_k = A diag(mask_k) / (1 - p);
usual MC dropout draws a mask for every position.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from tqdm import tqdm

from posterior.models import lora
from posterior.particles.ensemble import train_member
from posterior.training.job import Job, Result, particles


def fit(job: Job) -> Result:
    """Train one adapter with --dropout p, then draw the masks; map/ holds the adapter without one."""
    with tqdm(total=job.training.total_steps(len(job.examples)), desc="training", unit="step") as bar:
        trainer = train_member(job, 0, bar)
    theta = lora.get(job.model)
    record = {
        "method": "dropout",
        "probability": job.args.dropout,
        "training": asdict(job.training),
        "log_likelihood": job.log_likelihood(),
        "history": trainer.history,
    }
    thetas = [masked(theta, job.args.dropout, job.member_seed(index)) for index in range(job.args.particles)]
    return particles(thetas, theta, job, record)


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
