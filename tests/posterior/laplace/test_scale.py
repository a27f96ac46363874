"""The scale of scores: its evidence against integrals and dense algebra, and what it chooses for bases that know, or
do not know, the answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from posterior.data.examples import Examples, collate
from posterior.data.scoring import Scoring
from posterior.errors import PosteriorError
from posterior.laplace import scale
from posterior.likelihood.scores import scores
from posterior.models import lora
from posterior.predictive.mixture import normal_points, square_root
from tests.posterior.conftest import dense_jacobian, make_examples, summed, tiny_llama


def draw_process(rows: int, answers: int, variance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Means, covariance and labels of a correlated process."""
    generator = torch.Generator().manual_seed(0)
    size = rows * (answers - 1)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    mean = torch.nn.functional.pad(torch.randn(rows, answers - 1, generator=generator, dtype=torch.float64), (1, 0))
    return mean, variance * root @ root.T / size, torch.arange(rows) % answers


def log_likelihood(f: Tensor, labels: Tensor) -> Tensor:
    """log p(labels) of scores f [..., N, C - 1] relative to the first answer's."""
    log_p = torch.nn.functional.pad(f, (1, 0)).log_softmax(-1)
    return log_p.gather(-1, labels[:, None].expand(*log_p.shape[:-1], 1)).sum((-1, -2))


@pytest.mark.parametrize(("variance", "tolerance"), [(0.0, 1e-12), (0.1, 1e-3), (2.0, 0.1)])
def test_evidence_is_the_integral(variance, tolerance):
    """By 2^15 quasi-Monte-Carlo points over 3 rows of 3 answers; the tolerance is what Laplace's approximation costs,
    the more the wider the process is."""
    mean, covariance, labels = draw_process(3, 3, variance)
    f = mean[:, 1:].flatten() + normal_points(6, 2**15, 0) @ square_root(covariance).T
    exact = log_likelihood(f.view(-1, 3, 2), labels).logsumexp(0) - math.log(len(f))
    assert scale.evidence(mean, covariance, labels) == pytest.approx(float(exact), abs=tolerance)


def test_evidence_is_laplace_s_approximation():
    """The mode by L-BFGS over the scores themselves, and autograd's Hessian there. To 1e-3: Newton's method stops where
    the log posterior is within 1e-6, so the mode and the logdet are off by the root of that."""
    mean, covariance, labels = draw_process(4, 3, 9.0)
    inverse = torch.linalg.inv(covariance)

    def loss(f: Tensor) -> Tensor:
        moved = f - mean[:, 1:].flatten()
        return moved @ inverse @ moved / 2 - log_likelihood(f.view(4, 2), labels)

    f = mean[:, 1:].flatten().clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([f], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(f)
        value.backward()
        return value

    optimizer.step(closure)
    hessian = torch.autograd.functional.hessian(loss, f.detach())
    expected = (
        -loss(f.detach()) - torch.linalg.slogdet(hessian).logabsdet / 2 - torch.linalg.slogdet(covariance).logabsdet / 2
    )
    assert scale.evidence(mean, covariance, labels) == pytest.approx(float(expected), abs=1e-3)


def test_an_absent_answer_changes_nothing():
    """A row of two answers among rows of three."""
    mean, covariance, labels = draw_process(1, 2, 1.0)
    wider = torch.nn.functional.pad(mean, (0, 1), value=scale.ABSENT)
    padded = torch.nn.functional.pad(covariance, (0, 1, 0, 1))
    assert scale.evidence(wider, padded, labels) == pytest.approx(scale.evidence(mean, covariance, labels), abs=1e-9)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_process_is_the_linearised_network(batch_size):
    """Scores and K = J_B J_B^T by torch.func, of rows with two and three answers; the projection errs by
    |J_i| |J_j| / sqrt(COLUMNS / 2) = .022 |J_i| |J_j|, and no entry by more than five times that."""
    network = lora.attach(tiny_llama().double(), rank=2, alpha=4, seed=1).double()
    rows = [
        replace(e, continuations=e.continuations[: 2 + i % 2], label=0)
        for i, e in enumerate(make_examples(5, tokens=2))
    ]
    examples = Examples(rows, Scoring("mean"))
    f, gram = scale.process(network, examples, batch_size, 0)
    rows = []
    for row in range(len(examples)):
        batch = collate(examples[row : row + 1])
        expected = scores(network, batch)[0].detach()
        answers = len(expected)
        torch.testing.assert_close(f[row, :answers], expected - expected[0], rtol=1e-9, atol=1e-12)
        found = {name: j[0] for name, j in dense_jacobian(network, batch).items() if name.endswith(".B")}
        jacobian = torch.cat([j.flatten(1) for j in found.values()], 1)
        rows.append(torch.nn.functional.pad(jacobian[1:] - jacobian[:1], (0, 0, 0, 3 - answers)))
    j = torch.cat(rows)
    norms = j.norm(dim=1)
    assert ((gram - j @ j.T).abs() <= 5 * (2 / scale.COLUMNS) ** 0.5 * norms[:, None] * norms).all()
    assert (f == scale.ABSENT).sum() == 3


def test_a_base_that_is_sure_and_wrong_is_scaled_down():
    """With labels that the base itself chooses the scale stays 1; of labels drawn without looking, by a base whose
    scores are ten times as far apart, it becomes small, and no other scale is more probable."""
    network = lora.attach(tiny_llama().double(), rank=2, alpha=4, seed=1).double()
    examples = replace(make_examples(24, tokens=2), scoring=Scoring("sum", 10.0))
    answers = [int(scores(network, collate(summed(e)))[0].argmax()) for e in examples]
    right = replace(examples, rows=[replace(e, label=answer) for e, answer in zip(examples, answers, strict=True)])
    assert scale.fit(network, right, 8) == 1.0
    chosen = scale.fit(network, examples, 8)
    found = {s: value - math.log(s) ** 2 / 2 for s, value in scale.evidences(network, examples, 8).items()}
    assert chosen <= 0.5 and found[chosen] == max(found.values())


def test_scores_that_are_not_finite_are_refused():
    network = lora.attach(tiny_llama(), rank=2, seed=1)
    torch.nn.init.constant_(network.get_input_embeddings().weight, math.nan)
    with pytest.raises(PosteriorError, match="scores of the answers are not finite"):
        scale.fit(network, make_examples(3, tokens=2), 4)


def test_a_fit_chooses_the_scale_of_answers_of_several_tokens(run_fit, tmp_path, monkeypatch):
    """Only there, and only where an adapter is trained; a number is taken as it is."""
    monkeypatch.setattr(scale, "fit", lambda *_args: 0.25)
    several = {"answers": ["no", "yes"]}  # whose tokens are bytes
    chosen = run_fit(tmp_path / "chosen", **several)
    assert chosen.task.scoring.scale == 0.25
    assert run_fit(tmp_path / "fixed", scale=0.5, **several).task.scoring.scale == 0.5
    assert run_fit(tmp_path / "particles", method="swag", **several).task.scoring.scale == 1
    assert run_fit(tmp_path / "adapter", adapter=chosen.map_dir, **several).task.scoring.scale == 1
    assert run_fit(tmp_path / "single").task.scoring.scale == 1
    assert run_fit(tmp_path / "asked", scale="evidence").task.scoring.scale == 0.25
