"""The authors' optimiser, ivon-opt, takes the same steps as ours, from the same noise and gradients."""

from __future__ import annotations

from typing import Any

import ivon
import pytest
import torch

from posterior.particles.ivon import OnlineNewton

SIZE, RATE, RADIUS = 50.0, 0.02, 0.4  # lambda, rho, xi
DELTAS, HESSIANS = (0.3, 2.0), (0.0625, 1.0)  # of two matrices; theirs rounds the latter to float32


def loss(*matrices: torch.Tensor) -> torch.Tensor:
    """Neither quadratic nor separable."""
    a, b = matrices
    return (b @ a).tanh().square().sum() + (a.square().sum() + 1).log() + b.exp().sum() / 10


@pytest.mark.parametrize("radius", [RADIUS, float("inf")])
def test_the_same_steps(radius: float) -> None:
    """A mean of zero of the prior, the only one that theirs has. Where theirs does not clip, our radius is large."""
    torch.manual_seed(0)
    start = [0.5 * torch.randn(2, 3, dtype=torch.float64), 0.5 * torch.randn(4, 2, dtype=torch.float64)]
    ours, theirs = ([value.clone().requires_grad_() for value in start] for _ in range(2))
    own = min(radius, 1e6)
    groups: list[dict[str, Any]] = [
        {"params": [mean], "origin": torch.zeros_like(mean), "delta": delta, "hessian": hessian}
        for mean, delta, hessian in zip(ours, DELTAS, HESSIANS, strict=True)
    ]
    optimizer = OnlineNewton(groups, RATE * own, momentum=0.9, memory=0.95, radius=own)
    oracle = ivon.IVON(
        [
            {"params": [mean], "weight_decay": delta, "hess_init": hessian}
            for mean, delta, hessian in zip(theirs, DELTAS, HESSIANS, strict=True)
        ],
        lr=RATE,
        ess=SIZE,
        beta1=0.9,
        beta2=0.95,
        clip_radius=radius,
        rescale_lr=False,
    )
    for step in range(60):
        torch.manual_seed(step)
        with oracle.sampled_params(train=True):
            oracle.zero_grad()
            loss(*theirs).backward()  # type: ignore[no-untyped-call]
        oracle.step()

        torch.manual_seed(step)
        states = [optimizer.state[mean] for mean in ours]
        sigma = [(SIZE * (each["hessian"] + d)) ** -0.5 for each, d in zip(states, DELTAS, strict=True)]
        noise = [torch.randn(mean.numel(), dtype=torch.float64).view_as(mean) for mean in ours]
        drawn = [(m + s * e).detach().requires_grad_() for m, s, e in zip(ours, sigma, noise, strict=True)]
        gradients = torch.autograd.grad(loss(*drawn), drawn)
        for mean, state, s, e, gradient in zip(ours, states, sigma, noise, gradients, strict=True):
            mean.grad, state["estimate"] = gradient, gradient * e / s
        optimizer.step()

        for mean, their, group in zip(ours, theirs, oracle.param_groups, strict=True):
            torch.testing.assert_close(mean, their, rtol=1e-9, atol=1e-12)
            hessian = optimizer.state[mean]["hessian"].flatten()
            torch.testing.assert_close(hessian, group["hess"], rtol=1e-9, atol=1e-12)
    assert max(float((a - b).detach().abs().max()) for a, b in zip(ours, start, strict=True)) > 0.1
