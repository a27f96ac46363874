"""`--method ivon`: IVON, a variational Gaussian by a Newton-like optimiser (Shen et al. 2024, arXiv 2402.17641,
algorithm 1; on LoRA: Cong et al. 2025, arXiv 2506.14280).

q(theta) = N(m, diag(sigma^2)) over all entries of A and B. It minimises
    E_q[ - log p(D, theta) ] - T H(q),
so T = 1 is the variational bound, and q tends to a point, the MAP, as T goes to 0. m and the mean diagonal Hessian h of
a row's loss are learned together. With N rows, lambda = N / T, delta = prior precision / N, and g the gradient of the
batch's mean loss at theta = m + sigma eps, eps standard normal, step t is
    h_hat = g eps / sigma
    g_bar <- beta1 g_bar + (1 - beta1) g
    h     <- beta2 h + (1 - beta2) h_hat + (1 - beta2)^2 (h - h_hat)^2 / (2 (h + delta))
    m     <- m - rho clip[ (g_bar / (1 - beta1^t) + delta (m - theta_0)) / (h + delta) ],   clip to [-xi, xi]
    sigma  = 1 / sqrt(lambda (h + delta)).
h_hat estimates the Hessian without a bias (Stein's identity). The last term of h keeps h + delta above zero.

What differs from the paper, whose prior has one precision and the mean zero: theta_0 is the initialisation, and each
matrix has its prior's precision. q starts as the prior tempered by T (h = 0), where the data have said nothing yet. The
learning rate is rho xi, the most that an entry moves in a step; Adam's steps are about as long as its learning rate,
so one number suits both. The paper's optional factor h_0 + delta of rho is left out, as in the second paper's code: it
would make A's steps 3 d_in / (precision of B) times as long as B's.

The defaults were not compared on held-out rows. beta1 is the papers'. At T = .01 the sigma of B starts at .032, as in
the second paper's code on its smallest sets (lambda 1e6, h 1e-3). beta2 and xi are ours, for some 100 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posterior.data.examples import Batch, Examples
from posterior.models import lora
from posterior.particles.blob import draw, moved
from posterior.settings import POSITIVE, setting
from posterior.training.map import Trainer, Training
from posterior.training.method import PARTICLES, TEMPERATURE, Job, Result, TrainedParticles
from posterior.training.prior import prior_precision

MOMENTUM = 0.9  # beta1
MEMORY = 0.99  # beta2: h is a mean over some 100 steps. The paper's .99999 is for 10,000 steps and more
RADIUS = 0.01  # xi. The second paper's code has .001, with a learning rate of 3e-5 in our sense


class OnlineNewton(torch.optim.Optimizer):
    """Algorithm 1 without the draw: a gradient and an estimate of the Hessian in, a step of m and h out.

    A group is one matrix, {"params": [m], "origin": theta_0, "delta": delta}, and "hessian", where h starts.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        learning_rate: float,
        *,
        momentum: float = MOMENTUM,
        memory: float = MEMORY,
        radius: float = RADIUS,
    ):
        super().__init__(groups, {"lr": learning_rate, "hessian": 0.0})
        self.momentum, self.memory, self.radius = momentum, memory, radius
        for group in self.param_groups:
            (mean,) = group["params"]
            hessian = torch.full_like(mean, group["hessian"])
            self.state[mean] = {"step": torch.zeros(()), "momentum": torch.zeros_like(mean), "hessian": hessian}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every m against its `grad`, and every h towards the "estimate" that the caller left in its state."""
        for group in self.param_groups:
            (mean,) = group["params"]
            delta, state = group["delta"], self.state[mean]
            state["step"] += 1
            state["momentum"] = self.momentum * state["momentum"] + (1 - self.momentum) * mean.grad
            state["hessian"] = new_hessian(state["hessian"], state.pop("estimate"), delta, self.memory)
            gradient = state["momentum"] / (1 - self.momentum ** float(state["step"]))
            newton = (gradient + delta * (mean - group["origin"])) / (state["hessian"] + delta)
            mean -= group["lr"] / self.radius * newton.clamp(-self.radius, self.radius)


def new_hessian(hessian: Tensor, estimate: Tensor, delta: float, memory: float) -> Tensor:
    """h after an estimate. With x = (1 - beta2) (h_hat - h) / (h + delta), h + delta grows by the factor
    1 + x + x^2 / 2, which is at least a half."""
    change = (1 - memory) * (estimate - hessian)
    return hessian + change + change.square() / (2 * (hessian + delta))


class IvonTrainer(Trainer):
    """A Trainer whose theta, in the model, is the mean m of q."""

    moments = ("momentum", "hessian")

    def __init__(
        self,
        model: nn.Module,
        examples: Examples,
        precision: Mapping[str, float],
        training: Training,
        temperature: float,
    ):
        super().__init__(model, examples, precision, training)
        self.size = len(examples) / temperature  # lambda
        self.delta = {name: value / len(examples) for name, value in self.precision.items()}
        groups = [
            {"params": [parameter], "origin": self.origin[name], "delta": self.delta[name]}
            for name, parameter in self.parameters.items()
        ]
        self.optimizer = OnlineNewton(groups, training.learning_rate)

    def gradient(self, batch: Batch) -> float:
        """The gradient of the mean negative log-likelihood at one draw of theta, and from it the estimate of h."""
        mean, deviation = lora.get(self.model), self.deviation()
        noise = {name: torch.randn(each.shape, dtype=each.dtype).to(each) for name, each in deviation.items()}
        lora.put(self.model, moved(mean, deviation, noise))
        nll = self.loss(batch)
        nll.backward()  # type: ignore[no-untyped-call]
        lora.put(self.model, mean)
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            self.optimizer.state[parameter]["estimate"] = parameter.grad * noise[name] / deviation[name]
        return float(nll.detach())

    def deviation(self) -> lora.Theta:
        """sigma of every matrix."""
        hessian = {name: self.optimizer.state[parameter]["hessian"] for name, parameter in self.parameters.items()}
        return {name: (self.size * (h + self.delta[name])).rsqrt() for name, h in hessian.items()}


@dataclass(frozen=True, kw_only=True)
class Ivon(TrainedParticles):
    """Draws of a variational Gaussian on A and B."""

    temperature: float = setting(0.01, TEMPERATURE, POSITIVE, PARTICLES)

    def fit(self, job: Job) -> Result:
        """K draws of A and B; map/ holds the mean m. An interrupted fit goes on."""
        precision = prior_precision(lora.get(job.model), self.prior_precision)
        trainer = IvonTrainer(job.model, job.examples, precision, self.training, self.temperature)
        job.checkpoint.complete(trainer)
        mean, deviation = lora.get(job.model), trainer.deviation()
        tempered = {name: (self.temperature / each) ** 0.5 for name, each in precision.items()}
        record = {
            "method": "ivon",
            "temperature": self.temperature,
            "training": asdict(self.training),
            "log_likelihood": job.log_likelihood(self.batch_size),
            "relative_deviation": {  # of the tempered prior's: 1 where the data said nothing
                side: float(torch.cat([(deviation[n] / tempered[n]).flatten() for n in mean if n[-1] == side]).mean())
                for side in "AB"
            },
            "history": trainer.history,
        }
        thetas = [draw(mean, deviation, self.member_seed(index)) for index in range(self.particles)]
        return self.result(thetas, mean, record, self.prior)
