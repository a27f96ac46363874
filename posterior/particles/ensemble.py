"""`--method ensemble`: K MAP adapters, each from its own initialisation and data order (Lakshminarayanan et al. 2017).

Members share the prior's precisions, not its mean: A's is each member's own initialisation, drawn from what
posterior/cli/fit.py takes for A's prior, so that members do not all fall back to one A where the data say nothing.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from posterior.models import lora, pissa
from posterior.training.job import Job, Result, particles, prior_precision
from posterior.training.map import Trainer


def fit(job: Job) -> Result:
    """Train the members one after the other; map/ holds the one with the highest log-likelihood plus log-prior.

    A finished member, or a member's finished epoch, is not trained again when the same command runs again.
    """
    count = job.args.particles
    thetas, log_likelihoods, joint, histories = [], [], [], []
    with tqdm(total=count * job.training.total_steps(len(job.examples)), desc="training", unit="step") as bar:
        for index in range(count):
            trainer = train_member(job, index, bar)
            thetas.append(lora.get(job.model))
            log_likelihoods.append(job.log_likelihood())
            joint.append(log_likelihoods[-1] - float(trainer.penalty().detach()))
            histories.append(trainer.history)
    best = joint.index(max(joint))
    record = {
        "method": "ensemble",
        "training": asdict(job.training),
        "map": best,
        "log_likelihood": log_likelihoods,
        "log_joint": joint,
        "history": histories,
    }
    return particles(thetas, thetas[best], job, record)


def train_member(job: Job, index: int, bar: tqdm[Any]) -> Trainer:
    """MAP from the member's own seed, left in the model; or what was missing of it."""
    seed = job.member_seed(index)
    if job.args.init == "pissa":
        pissa.initialise(job.model)
    else:
        lora.initialise(job.model, seed)
    precision = prior_precision(lora.get(job.model), float(job.args.prior_precision))
    trainer = Trainer(job.model, job.examples, precision, replace(job.training, seed=seed))
    checkpoint = job.checkpoint / f"{index:03d}"
    checkpoint.resume(trainer)
    bar.update(trainer.step)

    def progress(loss: float) -> None:
        bar.update()
        bar.set_postfix(member=index, nll=f"{loss:.3f}")

    while not trainer.done:
        trainer.run_epoch(progress)
        checkpoint.save(trainer)
    return trainer
