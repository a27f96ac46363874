"""What the default precision costs: the same server in bfloat16 against transformers + peft in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from posterior.models import base as base_models
from tests.server import folders
from tests.server.mixture import Reference
from tests.server.running import PARTICLES, Running, serving

# Of a candidate's probability. bfloat16 keeps 8 bits: a score between 16 and 32 is a multiple of 1/8, so that the
# difference of two is up to 1/8 off, which moves a probability of 1/2 by 0.03; the layers before it cost as much again.
TOLERANCE = 0.06
TEXTS = ["The food was wonderful.", "I waited an hour and left hungry.", "It was a restaurant.", "ok"]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("half"), "--dtype", "bfloat16") as running:
        yield running


def test_each_particle_is_within_the_tolerance(half: Running) -> None:
    tokenizer = base_models.load_tokenizer(half.base)
    answers = [tokenizer.encode(answer)[0] for answer in folders.TASK.answers or ()]
    inputs = [{"text": text} for text in TEXTS]
    data = half.predict(model="gang", inputs=inputs, per_particle=True)["data"]
    reference = Reference(half.base, [half.gang.path / f"particles/{k:03d}" for k in range(PARTICLES)])
    for row, item in zip(inputs, data, strict=True):
        log_p = reference.log_p(folders.TASK.prompt_ids(tokenizer, row), [])[0, :, answers]
        served = torch.tensor(item["per_particle"], dtype=torch.float64)
        assert torch.allclose(served, log_p.softmax(1), atol=TOLERANCE), (served, log_p.softmax(1))
