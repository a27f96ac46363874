"""`--method ensemble`: K MAP adapters, each from its own initialisation and data order (Lakshminarayanan et al. 2017).

Members share the prior's precisions, not its mean: A's is each member's own initialisation, drawn from what
posterior/training/prior.py takes for A's prior, so that members do not all fall back to one A where the data say
nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from tqdm import tqdm

from posterior.models import lora, pissa
from posterior.settings import setting
from posterior.training.map import Trainer
from posterior.training.method import LORA, Job, Result, TrainedParticles
from posterior.training.prior import prior_precision

Init = Literal["random", "pissa"]
INIT = (
    "where training starts: at B = 0 (random) or, for ensemble, dropout and swag, at the r principal components of the "
    "base's matrices, which makes an adapter of rank 2 r"
)


@dataclass(frozen=True, kw_only=True)
class Ensemble(TrainedParticles):
    """Adapters trained one by one."""

    init: Init = setting("random", INIT, group=LORA)

    def fit(self, job: Job) -> Result:
        """Train the members one after the other; map/ holds the one with the highest log-likelihood plus log-prior.

        A finished member, or a member's finished epoch, is not trained again when the same fit runs again.
        """
        thetas, log_likelihoods, joint, histories = [], [], [], []
        steps = self.particles * self.training.total_steps(len(job.examples))
        with tqdm(total=steps, desc="training", unit="step") as bar:
            for index in range(self.particles):
                trainer = train_member(self, self.init, job, index, bar)
                thetas.append(lora.get(job.model))
                log_likelihoods.append(job.log_likelihood(self.batch_size))
                joint.append(log_likelihoods[-1] - float(trainer.penalty().detach()))
                histories.append(trainer.history)
        best = joint.index(max(joint))
        record = {
            "method": "ensemble",
            "training": asdict(self.training),
            "map": best,
            "log_likelihood": log_likelihoods,
            "log_joint": joint,
            "history": histories,
        }
        return self.result(thetas, thetas[best], record, self.prior)


def train_member(method: TrainedParticles, init: Init, job: Job, index: int, bar: tqdm[Any]) -> Trainer:
    """MAP from the member's own seed, left in the model; or what was missing of it."""
    seed = method.member_seed(index)
    if init == "pissa":
        pissa.initialise(job.model)
    else:
        lora.initialise(job.model, seed)
    precision = prior_precision(lora.get(job.model), method.prior_precision)
    trainer = Trainer(job.model, job.examples, precision, replace(method.training, seed=seed))
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
