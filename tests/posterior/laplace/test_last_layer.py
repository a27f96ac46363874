"""`--last-layer`: only the last layer's matrices are uncertain."""

from __future__ import annotations

import pytest
import torch

from posterior.curvature import kfac
from posterior.data.examples import batches, collate
from posterior.errors import PosteriorError
from posterior.laplace import blockwise, gaussian
from posterior.laplace.linearized import LinearizedModel, moments
from posterior.models import lora
from posterior.models.base import load_model, resolve
from tests.posterior.conftest import dense_jacobian, make_examples, summed
from tests.posterior.curvature.test_kfac import dense, fit

LAST = [f"model.layers.1.self_attn.{module}.{side}" for module in ("q_proj", "v_proj") for side in "AB"]


def test_which_matrices():
    names = ["model.layers.9.q.A", "model.layers.10.q.A", "model.layers.10.q.B", "lm_head.A"]
    assert gaussian.uncertain(names, True) == names[1:3]
    assert gaussian.uncertain(names, False) == names
    with pytest.raises(PosteriorError, match="no layer's number in names such as 'lm_head.A'"):
        gaussian.uncertain(["lm_head.A"], True)


@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_samples_leave_the_other_layers_where_they_are(run_fit, tmp_path, structure):
    posterior = run_fit(last_layer=True, structure=structure)
    assert list(posterior.curvature) == list(posterior.precision) == LAST and posterior.fit["last_layer"]
    mean = lora.read_adapter(posterior.map_dir)
    for folder in posterior.adapters(2, tmp_path):
        found = lora.read_adapter(folder)
        assert {name for name in mean if not torch.equal(found[name], mean[name])} == set(LAST)


def test_served_covariance_is_of_the_last_layer_s_jacobian(run_fit, tiny_base):
    """Against torch.func Jacobians and dense inverses of those matrices alone; float32, 1e-4 relative."""
    posterior = run_fit(last_layer=True)
    base = resolve(str(tiny_base))
    (example,) = make_examples(1)
    ((_, covariance),) = LinearizedModel(base, {"tiny": posterior}).logits(
        "tiny", [example.prompt], [example.continuations]
    )
    model = lora.load_peft(load_model(base, torch.float32, "cpu"), posterior.map_dir)
    jacobians = dense_jacobian(model, collate(summed(example)))
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for name in LAST:
        j = lora.orient(name, jacobians[name])[0].flatten(1).double()
        j = j - j[:1]
        p = dense(posterior.curvature[name]).double()
        expected += j @ torch.linalg.inv(p + posterior.precision[name] * torch.eye(len(p)).double()) @ j.T
    torch.testing.assert_close(covariance, expected, rtol=1e-4, atol=1e-7)


def test_blocks_are_those_of_the_whole(model):
    """Leaving the others out changes nothing about the last layer's curvature, nor about what it says of the scores."""
    examples = make_examples(6)
    whole = fit(model, examples)
    matrices = {name: module for name, module in lora.matrices(model).items() if name in LAST}
    last = kfac.fit(model, matrices, (batch for _, batch in batches(examples, 4)))
    assert list(last) == LAST
    for name, block in last.items():
        torch.testing.assert_close(dense(block), dense(whole[name]))
    parts = [
        moments(model, lora.matrices(model), blockwise.Blocks(part, dict.fromkeys(part, 2.0)), collate(examples))[1]
        for part in (last, {name: block for name, block in whole.items() if name not in LAST}, whole)
    ]
    torch.testing.assert_close(parts[0] + parts[1], parts[2])


def test_the_other_layers_have_the_prior_of_map_training(run_fit, monkeypatch):
    seen = []

    class Recorded(gaussian.Trainer):
        def run_epoch(self, progress):
            seen.append(dict(self.precision))
            return super().run_epoch(progress)

    monkeypatch.setattr(gaussian, "Trainer", Recorded)
    posterior = run_fit(last_layer=True, epochs=3)
    first, *_, last = seen
    for name in posterior.precision:
        if name.endswith(".B"):
            assert first[name] == 1.0 and last[name] not in (1.0, 10.0)
    others = [name for name in first if name not in LAST and name.endswith(".B")]
    assert len(others) == 2 and all(first[name] == last[name] == 10.0 for name in others)


def test_heldout_and_layers_and_somebody_s_adapter(run_fit, tmp_path):
    trained = run_fit(tmp_path / "trained", method="ensemble", particles=1)
    posterior = run_fit(tmp_path / "last", adapter=trained.map_dir, last_layer=True, grouping="layer")
    assert list(posterior.precision) == LAST and len(posterior.prior["precision"]) == 2


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_text(run_fit, structure):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "ok"}]} for n in range(6)
    ]
    posterior = run_fit(rows=rows, task="text", last_layer=True, structure=structure)
    assert list(posterior.curvature) == LAST and posterior.fit["effective_dimension"] > 0
