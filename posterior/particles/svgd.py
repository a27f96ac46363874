"""`--method svgd`: K adapters that follow the gradient of log p(theta, D) and repel each other (Liu & Wang 2016,
arXiv 1608.04471; on LoRA: Doan et al. 2024, arXiv 2407.20891).

    phi_i = (1/K) sum_j [ k_ij (1/T) grad log p(theta_j, D) + grad_{theta_j} k_ij ],   k_ij = exp(-d_ij / h),

with the prior inside log p(theta, D) = N mean_n log p(y_n|x_n, theta) + log p(theta), h = median_{i<j} d_ij / log K.
d_ij is the squared distance of all parameters, of those of one LoRA layer (each layer then has its own kernel, and phi
is taken layer by layer), or of the layer's product, |B_i A_i - B_j A_j|^2, which no change of LoRA's gauge, B M and
M^-1 A, alters. Adam takes the steps on phi, as in the authors' own code: it changes the path, not where phi vanishes.

All particles share the prior: its mean for A is one initialisation A_0, with precision 3 d_in; for B zero. They start
as draws of A's prior, with B = 0. So the target is one density, the one that Laplace approximates, and adding the
gradient at theta_j to theta_i makes sense: their A are near each other. In so many dimensions SVGD is known to spread
far less than the posterior (Ba et al. 2022): the mean off-diagonal kernel and the bandwidth of each epoch are recorded,
and --no-repulsion is the ablation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from posterior.data.examples import Batch, Examples, batches
from posterior.likelihood.scores import log_likelihood
from posterior.likelihood.stacked import repeat, stack, stacked, unstack
from posterior.models import lora
from posterior.settings import POSITIVE, setting
from posterior.training.map import Trainer, Training
from posterior.training.method import PARTICLES, TEMPERATURE, Job, Result, TrainedParticles
from posterior.training.prior import groups, prior_precision

Kernel = Literal["parameters", "layer", "product"]
KERNEL = "what svgd measures distances between: all parameters, those of each layer, or each layer's product BA"


@dataclass(frozen=True)
class Similarity:
    """bandwidth: h; kernel: mean of k_ij over i != j (1 for one particle). Means over the layers that have their own
    kernel."""

    bandwidth: float
    kernel: float


def direction(
    theta: lora.Theta, score: Mapping[str, Tensor], kernel: Kernel, temperature: float = 1.0, repulsion: bool = True
) -> tuple[lora.Theta, Similarity]:
    """phi, shaped like theta and the score, grad log p(theta, D): K particles of each matrix, [K, ...].

    "parameters" takes tensors of any names and shapes; the other kernels LoRA's A and B.
    """
    phi: lora.Theta = {}
    found: list[Similarity] = []
    for names in groups(list(theta), "scalar" if kernel == "parameters" else "layer").values():
        members = {name: theta[name] for name in names}
        distance = product_distances(members) if kernel == "product" else distances(list(members.values()))
        h = bandwidth(distance)
        k = (-distance / h).exp()
        push = product_repulsion(members, k, h) if kernel == "product" else vector_repulsion(members, k, h)
        for name in names:
            drive = torch.einsum("ij,j...->i...", k.to(score[name]), score[name]) / temperature
            phi[name] = (drive + push[name] * repulsion) / len(k)
        found.append(Similarity(h, _mean_off_diagonal(k)))
    return phi, _mean(found)


def distances(values: Sequence[Tensor]) -> Tensor:
    """sum over the tensors [K, ...] of |x_i - x_j|^2, [K, K] in float64."""
    centred = [(value - value.mean(0)).flatten(1).double() for value in values]
    return _from_gram(torch.stack([x @ x.T for x in centred]).sum(0))


def product_distances(theta: Mapping[str, Tensor]) -> Tensor:
    """|B_i A_i - B_j A_j|^2, [K, K] in float64, of A [K, r, in] and B [K, out, r], by traces of r x r matrices."""
    (_, a), (_, b) = sorted(theta.items())
    aa, bb = _crossed(a.double(), b.double())
    return _from_gram((aa * bb).sum((2, 3)))


def bandwidth(distance: Tensor) -> float:
    """median_{i<j} d_ij / log K, so that the kernels of a particle with all the others sum to about 1. It is 1 where
    particles coincide (or there is one): any value gives k = 1 there."""
    count = len(distance)
    upper = distance[tuple(torch.triu_indices(count, count, 1))]
    median = float(upper.quantile(0.5)) if count > 1 else 0.0
    return median / math.log(count) if median > 0 else 1.0


def vector_repulsion(theta: lora.Theta, k: Tensor, h: float) -> lora.Theta:
    """sum_j grad_{theta_j} k_ij = (2/h) sum_j k_ij (theta_i - theta_j)."""
    result: lora.Theta = {}
    for name, value in theta.items():
        weights = k.to(value)
        centred = value - value.mean(0)
        total = weights.sum(1).view(-1, *[1] * (value.ndim - 1))
        result[name] = 2 / h * (total * centred - torch.einsum("ij,j...->i...", weights, centred))
    return result


def product_repulsion(theta: lora.Theta, k: Tensor, h: float) -> lora.Theta:
    """sum_j grad_{theta_j} k_ij of the product kernel. With D_ij = B_i A_i - B_j A_j:
    for A (2/h) sum_j k_ij B_j^T D_ij, for B (2/h) sum_j k_ij D_ij A_j^T; D_ij is never formed."""
    (a_name, a), (b_name, b) = sorted(theta.items())
    weights = 2 / h * k.to(a)
    aa, bb = _crossed(a, b)
    own = torch.arange(len(k))
    push_a = torch.einsum("ij,jirs->irs", weights, bb) @ a - torch.einsum("ij,jrn->irn", weights, bb[own, own] @ a)
    push_b = b @ torch.einsum("ij,ijrs->irs", weights, aa) - torch.einsum("ij,jor->ior", weights, b @ aa[own, own])
    return {a_name: push_a, b_name: push_b}


class SvgdTrainer(Trainer):
    """Training of a model whose adapter is a stack of K particles (posterior/likelihood/stacked.py). origin: the
    prior's mean."""

    def __init__(
        self,
        model: torch.nn.Module,
        examples: Examples,
        precision: Mapping[str, float],
        training: Training,
        origin: lora.Theta,
        kernel: Kernel = "layer",
        temperature: float = 1.0,
        repulsion: bool = True,
    ):
        super().__init__(model, examples, precision, training)
        self.origin = origin
        self.kernel, self.temperature, self.repulsion = kernel, temperature, repulsion
        self.count = len(next(iter(self.matrices.values())).weight)
        self.similarities: list[Similarity] = []  # of this epoch's steps

    def run_epoch(self, progress: Callable[[float], object] = lambda loss: None) -> float:
        """As Trainer's; the likelihood is the mean over the particles, too."""
        self.similarities = []
        nll = super().run_epoch(progress)
        self.history[-1] |= asdict(_mean(self.similarities))
        return nll

    def gradient(self, batch: Batch) -> float:
        """-phi / N, which for one particle (and T = 1) is the gradient of MAP's loss."""
        rows = len(self.examples)
        nll = -log_likelihood(self.model, repeat(batch, self.count)).view(self.count, -1).mean(1)
        (nll.sum() + self.penalty() / rows).backward()  # type: ignore[no-untyped-call]
        weights = {name: module.weight for name, module in self.matrices.items()}
        score = {name: -rows * _gradient(weight) for name, weight in weights.items()}
        theta = {name: weight.detach() for name, weight in weights.items()}
        phi, similarity = direction(theta, score, self.kernel, self.temperature, self.repulsion)
        for name, weight in weights.items():
            weight.grad = -phi[name] / rows
        self.similarities.append(similarity)
        return float(nll.detach().mean())

    def log_posterior(self) -> tuple[Tensor, Tensor]:
        """(log p(D|theta_k), that plus log p(theta_k) up to a constant), [K] each, in nats."""
        device = next(iter(self.matrices.values())).weight.device
        likelihood = torch.zeros(self.count, dtype=torch.float64)
        self.model.eval()
        with torch.no_grad():
            for _, batch in batches(self.examples, self.training.batch_size):
                rows = log_likelihood(self.model, repeat(batch.to(device), self.count))
                likelihood += rows.view(self.count, -1).double().sum(1).cpu()
        thetas = unstack(lora.get(self.model))
        penalty = [
            sum(self.precision[name] / 2 * float((theta[name] - self.origin[name]).square().sum()) for name in theta)
            for theta in thetas
        ]
        return likelihood, likelihood - torch.tensor(penalty, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Svgd(TrainedParticles):
    """Adapters trained together, repelling each other."""

    kernel: Kernel = setting("layer", KERNEL, group=PARTICLES)
    temperature: float = setting(1.0, TEMPERATURE, POSITIVE, PARTICLES)
    repulsion: bool = setting(True, "svgd without the particles' repulsion, to see what it buys", group=PARTICLES)

    def fit(self, job: Job) -> Result:
        """Train the particles together; map/ holds the one of the highest log p(theta, D). An interrupted fit goes
        on."""
        origin = lora.get(job.model)
        precision = prior_precision(origin, self.prior_precision)
        start = stack([draw(origin, precision, self.member_seed(index)) for index in range(self.particles)])
        with stacked(job.model, start):
            trainer = SvgdTrainer(
                job.model,
                job.examples,
                precision,
                self.training,
                origin,
                self.kernel,
                self.temperature,
                self.repulsion,
            )

            def shown() -> dict[str, str]:
                now = trainer.similarities[-1]
                return {"kernel": f"{now.kernel:.2f}", "bandwidth": f"{now.bandwidth:.2g}"}

            job.checkpoint.complete(trainer, shown=shown)
            likelihood, joint = trainer.log_posterior()
            thetas = unstack(lora.get(job.model))
        best = int(joint.argmax())
        record = {
            "method": "svgd",
            "kernel": self.kernel,
            "temperature": self.temperature,
            "repulsion": self.repulsion,
            "training": asdict(self.training),
            "map": best,
            "log_likelihood": likelihood.tolist(),
            "log_joint": joint.tolist(),
            "history": trainer.history,
        }
        return self.result(thetas, thetas[best], record, self.prior)


def draw(origin: lora.Theta, precision: Mapping[str, float], seed: int) -> lora.Theta:
    """A particle to start from: A drawn from its prior, B at its mean (drawn, it would scramble the base)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + torch.randn(value.shape, generator=generator).to(value) / math.sqrt(precision[name])
        if name.endswith(".A")
        else value.clone()
        for name, value in origin.items()
    }


def _crossed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A_i A_j^T and B_i^T B_j, [K, K, r, r] each."""
    return torch.einsum("irn,jsn->ijrs", a, a), torch.einsum("ior,jos->ijrs", b, b)


def _from_gram(gram: Tensor) -> Tensor:
    """|x_i - x_j|^2 from <x_i, x_j>, [K, K]; what cancellation leaves below zero is zero."""
    norms = gram.diagonal()
    return (norms[:, None] + norms - 2 * gram).clamp(min=0).fill_diagonal_(0)


def _mean_off_diagonal(k: Tensor) -> float:
    count = len(k)
    return float((k.sum() - k.trace()) / (count * (count - 1))) if count > 1 else 1.0


def _mean(similarities: Sequence[Similarity]) -> Similarity:
    count = len(similarities)
    return Similarity(sum(s.bandwidth for s in similarities) / count, sum(s.kernel for s in similarities) / count)


def _gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        raise RuntimeError("a LoRA matrix took no part in the forward pass")
    return weight.grad
