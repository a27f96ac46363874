"""What is said about a base when it is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from posterior.data import base_check
from posterior.data.base_check import check, joints, judge, probes
from posterior.data.task import Task
from posterior.models import base
from tests.posterior.conftest import tiny_llama
from tests.posterior.data.test_chat import PLAIN, STRICT
from tests.posterior.tokenizers_of_kinds import make

SENTIMENT = Task("choice", "{text}\nSentiment:", (" negative", " positive"))


def test_nothing_is_odd_about_the_default_base() -> None:
    default = base.resolve()
    tokenizer, model = base.load_tokenizer(default), base.load_model(default, torch.float32, "cpu")
    score = base_check.scorer(model)
    assert check(tokenizer, score, SENTIMENT) == check(tokenizer, score, Task("text", "{text}", chat=True)) == []
    damaged = model.get_input_embeddings().weight
    damaged.data = damaged.data[torch.randperm(len(damaged))]
    (line,) = check(tokenizer, score, SENTIMENT)
    assert "its weights or its tokenizer are damaged, or it is untrained" in line


def test_the_score_is_the_mean_log_likelihood() -> None:
    model, ids = tiny_llama(), [3, 7, 2, 9]
    loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert base_check.scorer(model)(ids) == pytest.approx(-float(loss), rel=1e-5)


@pytest.mark.parametrize(("edges", "does", "should", "value"), [
    ("none", "does not add BOS", "likelier with it", "true"),
    ("bos", "adds BOS", "likelier without it", "false"),
])  # fmt: skip
def test_a_wrong_bos(edges: str, does: str, should: str, value: str) -> None:
    tokenizer = make("first", edges)

    def score(ids: Sequence[int]) -> float:
        return -2.0 if (ids[0] == 0) == (edges == "none") else -4.5

    (line,) = check(tokenizer, score)
    assert does in line and f"2.5 nats a token {should}" in line
    assert f"add_bos_token in its tokenizer_config.json to {value}" in line
    assert check(tokenizer, lambda ids: -2.0 - 0.5 * score(ids) / 4.5) == [], "half a nat is within what a BOS may cost"


def test_probes_can_be_scored_anywhere() -> None:
    found = probes(make("always", "both"))
    assert found["own"] == (0, *found["other"]) and 1 not in found["own"]
    assert judge(found, {"own": -2.0, "other": -2.1}, 300) == []
    for value in (-5.7, float("nan"), float("-inf")):
        (line,) = judge(found, {"own": value, "other": value}, 300)
        assert "damaged" in line and "\n" not in line


@pytest.mark.parametrize(
    ("template", "answers", "match"),
    [
        ("{text}\nSentiment: ", (" a", " b"), "the template ends in a space and answers start with one"),
        ("{text}\nSentiment: ", ("a", "b"), "the template ends in a space; leave it to the answers (' a')"),
        ("{text}\nSentiment:", ("a", "b"), "nothing stands between the template's end"),
        ("{text}\nSentiment:", (" a", " b"), None),
        ("{text}\nSentiment:\n", ("a", "b"), None),
        ("{text}", ("a", "b"), None),
        ("{text}: ", None, None),
    ],
)
def test_where_prompts_and_answers_meet(template: str, answers: tuple[str, ...] | None, match: str | None) -> None:
    found = joints(make("byte-level"), Task("choice", template, answers))
    assert found == [] if match is None else [match in line for line in found] == [True]


def test_chat_templates() -> None:
    task, tokenizer = Task("choice", "{text}", ("a", "b"), chat=True), make("byte-level")
    cases: dict[str | None, str | None] = {
        PLAIN: None,
        None: "on a chat of two turns: the base has no chat template",
        STRICT.replace("system", "assistant"): "on a chat of two turns: .* System role not supported",
        "{{ messages[0].content }}": "leaves out what was said",
        "{% for m in messages %}{{ m.text }}{% endfor %}": "leaves out what was said",
    }
    for template, match in cases.items():
        tokenizer.chat_template = template
        found: list[Any] = joints(tokenizer, task)
        assert len(found) == (match is not None)
        assert all(re.search(str(match), line) for line in found)
