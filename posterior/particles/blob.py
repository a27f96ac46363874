"""`--method blob`: Bayesian low-rank adaptation by backpropagation (Wang et al. 2024, arXiv 2406.11675): a variational
Gaussian on A, trained together with a deterministic B.

q(A) = N(M, diag(Omega^2)) with Omega = G^2 entry by entry, G the trained parameter. What is minimised is the negative
variational bound over N,
    (1/N) [ - sum_n E_q log p(y_n|x_n, A, B) + KL(q(A) || p(A)) + (lambda/2) |B|^2 ].
The paper asks for the KL between the laws of the whole update B A, under a prior that is as low in rank as B. An
injective linear map changes no KL, so where B has full column rank, and the prior is p(A) carried through the same B,
it is the KL on A (the paper's theorem 3.2), which needs no d_out x d_in matrix.

p(A) = N(A_0, I / (3 d_in)), as for the other methods: A_0 is the initialisation and the variance that of its draw. (The
public code has N(0, 0.2^2 I). About zero, A_0 alone would cost r d_in / 2 nats a matrix: it is evidence of nothing.)
Omega starts at the prior's standard deviation, where the KL is zero, as N rows determine few of A's entries. (The
public code starts far below its prior. From a tenth of ours, 75 steps on 200 rows of yelp reach .28 of it, and a KL of
220,000 nats; from the prior's, penalty and misfit together are some 40.)

One draw of A a step, shared by the rows of the batch, gives an unbiased gradient. The paper's flipout gives rows noise
of their own, for less variance; its public code flips signs by position, so that one text is read by many A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from posterior.data.examples import Batch, Examples
from posterior.likelihood.scores import log_likelihood
from posterior.models import lora
from posterior.training.map import Trainer, Training
from posterior.training.method import Job, Result, TrainedParticles
from posterior.training.prior import prior_precision


class BlobTrainer(Trainer):
    """A Trainer whose A, in the model, is the mean M; root: G of every A."""

    def __init__(self, model: nn.Module, examples: Examples, precision: Mapping[str, float], training: Training):
        super().__init__(model, examples, precision, training)
        self.root = {
            name: torch.full_like(module.weight, precision[name] ** -0.25).requires_grad_()
            for name, module in self.matrices.items()
            if name.endswith(".A")
        }
        self.optimizer.add_param_group({"params": list(self.root.values())})
        self.parameters |= {f"{name}/root": root for name, root in self.root.items()}

    def gradient(self, batch: Batch) -> float:
        """As Trainer's, of the variational bound at one draw of A; the negative log-likelihood is that draw's."""
        mean, deviation = lora.get(self.model), self.deviation()
        noise = {name: torch.randn_like(value) for name, value in deviation.items()}
        lora.put(self.model, moved(mean, deviation, noise))
        nll = -log_likelihood(self.model, batch).mean()
        weights = [module.weight for module in self.matrices.values()]
        data = dict(zip(self.matrices, torch.autograd.grad(nll, weights), strict=True))
        lora.put(self.model, mean)
        data |= {f"{name}/root": data[name] * noise[name] * 2 * root.detach() for name, root in self.root.items()}
        prior = torch.autograd.grad(self.penalty() / len(self.examples), list(self.parameters.values()))
        for (name, parameter), each in zip(self.parameters.items(), prior, strict=True):
            parameter.grad = data[name] + each
        return float(nll.detach())

    def penalty(self) -> Tensor:
        """KL(q(A) || p(A)) + (lambda/2) |B|^2, in nats: MAP's penalty of M and B, and what Omega adds,
        sum (lambda Omega^2 - 1 - log(lambda Omega^2)) / 2."""
        widths = [self.precision[name] * root.square().square() for name, root in self.root.items()]
        return super().penalty() + torch.stack([(w - 1 - w.log()).sum() / 2 for w in widths]).sum()

    def deviation(self) -> lora.Theta:
        """Omega of every A."""
        return {name: root.detach().square() for name, root in self.root.items()}


@dataclass(frozen=True, kw_only=True)
class Blob(TrainedParticles):
    """Draws of a variational Gaussian on A."""

    def fit(self, job: Job) -> Result:
        """K draws of A, all with the one B; map/ holds M and B. An interrupted fit goes on."""
        precision = prior_precision(lora.get(job.model), self.prior_precision)
        trainer = BlobTrainer(job.model, job.examples, precision, self.training)
        job.checkpoint.complete(trainer)
        mean, deviation = lora.get(job.model), trainer.deviation()
        relative = torch.cat([(value * precision[name] ** 0.5).flatten() for name, value in deviation.items()])
        record = {
            "method": "blob",
            "training": asdict(self.training),
            "log_likelihood": job.log_likelihood(self.batch_size),
            "penalty": float(trainer.penalty().detach()),
            "relative_deviation": float(relative.mean()),  # of the prior's: 1 where the data said nothing
            "history": trainer.history,
        }
        thetas = [draw(mean, deviation, self.member_seed(index)) for index in range(self.particles)]
        return self.result(thetas, mean, record, self.prior)


def draw(mean: lora.Theta, deviation: lora.Theta, seed: int) -> lora.Theta:
    """A particle: matrices with a deviation from q, the others as they are. Drawn on the CPU: the seed fixes it
    anywhere."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in deviation.items()}
    return moved(mean, deviation, noise)


def moved(mean: lora.Theta, deviation: lora.Theta, noise: lora.Theta) -> lora.Theta:
    """M + Omega E for every matrix with noise; the others unchanged."""
    return mean | {name: mean[name] + deviation[name] * each for name, each in noise.items()}
