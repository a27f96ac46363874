"""Tasks, candidates and rows: what is accepted, and the sentence for what is not."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from posterior.data import candidates
from posterior.data.examples import WINDOW, batches, collate, encode, shuffled
from posterior.data.scoring import Scoring
from posterior.data.task import Task
from posterior.errors import PosteriorError
from tests.posterior.conftest import make_examples, summed

TASK = Task("choice", "{text}\nSentiment:", (" negative", " positive"))


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return AutoTokenizer.from_pretrained(tiny_base)


def test_template_renders_and_names_its_fields():
    task = Task("choice", "{q} {{x}} {q} {b}", ("a", "b"))
    assert task.fields == ("q", "b")
    assert task.render({"q": "1", "b": "2", "other": 3}) == "1 {x} 1 2"


@pytest.mark.parametrize("template", ["none", "{a.b}", "{a!r}", "{0}", "{a[0]}", "{", "{a:>9}"])
def test_templates_hold_only_plain_fields(template):
    with pytest.raises(PosteriorError):
        Task("choice", template, ("a", "b"))


def test_task_errors_name_the_field():
    with pytest.raises(PosteriorError, match="'text' is missing"):
        TASK.render({"prompt": "x"})
    with pytest.raises(PosteriorError, match="unknown field 'label'"):
        TASK.render({"text": "x", "label": 1}, exact=True)
    with pytest.raises(PosteriorError, match="text task has no candidate"):
        Task("text", "{a}", ("b", "c"))


def test_task_survives_json():
    for task in (TASK, replace(TASK, scoring=Scoring("sum")), replace(TASK, scoring=Scoring(scale=0.25))):
        assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


def test_the_tasks_of_older_posteriors_sum_scores():
    record = {"kind": "choice", "template": "{q}", "answers": None, "chat": False}
    task = Task.from_json(record)
    assert task.scoring == Scoring("sum") and task.to_json() == record, (
        "the hash of its records of calibration is the same"
    )
    with pytest.raises(PosteriorError, match="scores 'product' are unknown; use 'mean' or 'sum'"):
        Task.from_json(record | {"scores": "product"})
    for scale in (0, -1, math.nan, "1"):
        with pytest.raises(PosteriorError, match=f"scale of scores is {scale!r}; it must be a positive number"):
            Task.from_json(record | {"scale": scale})


def test_examples_are_scored_as_their_task_says(tokenizer):
    row = {"q": "x", "choices": ["a", "b c"], "label": 0}
    for scores in ("mean", "sum"):
        rule = Scoring(scores, 0.5)
        examples = encode(Task("choice", "{q}", scoring=rule), tokenizer, [row])
        assert examples.scoring is rule and collate(examples).scoring is rule
    text = encode(Task("text", "{q}"), tokenizer, [{"q": "x", "response": "y"}])
    assert text.scoring == Scoring("sum"), "a text's likelihood is the sum"


@pytest.mark.parametrize(
    ("answers", "match"),
    [
        ([], "0 candidate"),
        (["a"], "1 candidate"),
        (["a"] * 256, "256 candidate"),
        (["a", "a"], "tokenise alike"),
        (["a", ""], "no tokens"),
    ],
)
def test_candidates_are_checked(tokenizer, answers, match):
    with pytest.raises(PosteriorError, match=match):
        candidates.encode(tokenizer, answers)


@pytest.mark.parametrize("label", [1, "positive", " positive"])
def test_labels_by_index_or_by_answer(tokenizer, label):
    assert encode(TASK, tokenizer, [{"text": "good", "label": label}])[0].label == 1


@pytest.mark.parametrize(
    ("answers", "label", "index"),
    [
        (("no", "yes"), "1", 1),  # CSV has every index in words
        (("no", "yes"), " 0 ", 0),
        (("1", "2", "3"), "2", 1),  # an answer first, then an index
        ((" 1", " 2", " 3"), "1", 0),
        (("a", " a"), " a", 1),  # exactly, then without spaces
    ],
)
def test_labels_in_words(tokenizer, answers, label, index):
    assert encode(Task("choice", "{text}:", answers), tokenizer, [{"text": "x", "label": label}])[0].label == index


@pytest.mark.parametrize(("answers", "label"), [(("a ", " a"), "a"), (("no", "yes"), "2"), (("no", "yes"), "1.0")])
def test_labels_that_say_nothing_or_two_things(tokenizer, answers, label):
    with pytest.raises(PosteriorError, match="row 1: label"):
        encode(Task("choice", "{text}:", answers), tokenizer, [{"text": "x", "label": label}])


@pytest.mark.parametrize("label", [None, 2, -1, True, "neutral", 1.0])
def test_bad_labels_name_the_row(tokenizer, label):
    with pytest.raises(PosteriorError, match="row 2: label"):
        encode(TASK, tokenizer, [{"text": "good", "label": 0}, {"text": "x", "label": label}])


def test_rows_may_bring_their_own_choices(tokenizer):
    task = Task("choice", "{q}")
    example = encode(task, tokenizer, [{"q": "x", "choices": ["a", "b", "c"], "label": 2}])[0]
    assert len(example.continuations) == 3 and example.label == 2
    with pytest.raises(PosteriorError, match="row 1: the task has no answers"):
        encode(task, tokenizer, [{"q": "x", "label": 2}])


def test_too_long_rows_are_never_cut(tokenizer):
    with pytest.raises(PosteriorError, match="row 1 has .* tokens, more than --max-length 8; shorten"):
        encode(TASK, tokenizer, [{"text": "long " * 20, "label": 0}], longest=8, limit="--max-length 8")


def test_messages_and_prompt_response_rows(tokenizer):
    task = Task("text", "{q}")
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    first, second = encode(task, tokenizer, [chat, {"q": "hi", "response": "yes"}])
    assert tokenizer.decode(first.prompt) == "user:hi\nassistant:"
    assert first.continuations == second.continuations
    assert first.continuations[0][-1] == tokenizer.eos_token_id
    for row in ({"messages": chat["messages"][:1]}, {"q": "hi"}, {"messages": []}):
        with pytest.raises(PosteriorError, match="row 1"):
            encode(task, tokenizer, [row])


def test_batches_cover_every_row_once_and_keep_kinds_apart():
    examples = summed(*make_examples(9), *make_examples(5, tokens=2), *make_examples(4, answers=2))
    seen = []
    for indices, batch in batches(examples, 4):
        seen += indices
        assert len(indices) <= 4 and len({examples[i].single for i in indices}) == 1
        assert len({len(examples[i].continuations) for i in indices}) == 1
        assert len(batch.label) == len(indices)
    assert sorted(seen) == list(range(18))


@pytest.mark.parametrize("tokens", [1, 60, 200])
def test_no_batch_of_several_examples_has_more_tokens_than_allowed(tokens):
    examples = summed(*make_examples(30, length=(2, 40)), *make_examples(20, tokens=2, length=(2, 40)))
    found = list(batches(examples, 4, tokens=tokens))
    assert sorted(i for indices, _ in found for i in indices) == list(range(50))
    for indices, batch in found:
        assert len(indices) == 1 or (len(indices) <= 4 and batch.separate().tokens.numel() <= tokens)
    for (indices, _), (following, _) in itertools.pairwise(found):
        first, more = examples[indices[0]], examples[following[0]]
        if len(indices) < 4 and (first.single, len(first.continuations)) == (more.single, len(more.continuations)):
            grown = collate(examples.take([*indices, following[0]]))
            assert grown.separate().tokens.numel() > tokens, "a batch ends where the next example would be too much"


def test_a_shuffled_order_has_every_row_once_and_is_its_seeds():
    examples = summed(*make_examples(150, length=(2, 60)), *make_examples(57, tokens=2))
    first, again, other = (shuffled(examples, 8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert sorted(first) == list(range(207)) and first == again != other
    kinds = [examples[i].single for i in first]
    assert (
        len({len(batch.label) for _, batch in batches(examples, 8, order=first)}) > 1
    )  # batches end where kinds change
    assert any(kinds[:100]) and not all(kinds[:100])


@pytest.mark.parametrize("size", [1, 8, 16])
def test_shuffled_batches_pad_little_and_mix_lengths_over_time(size):
    examples = make_examples(WINDOW * size * 4 + size // 2, length=(2, 60))
    order = shuffled(examples, size, torch.Generator().manual_seed(0))
    padded = sum(batch.tokens.numel() for _, batch in batches(examples, size, order=order))
    assert padded < 1.25 * sum(example.length for example in examples)
    longest = [batch.tokens.shape[1] for _, batch in batches(examples, size, order=order)]
    assert longest != sorted(longest) and len(order) == len(set(order)) == len(examples)
    counts = [len(batch.label) for _, batch in batches(examples, size, order=order)]
    assert set(counts[:-1]) == {size} and counts[-1] == (size // 2 or size)


def test_left_padding_and_positions():
    batch = collate(make_examples(4))
    assert bool((batch.mask[:, -1] == 1).all())
    for mask, positions in zip(batch.mask, batch.positions, strict=True):
        assert positions[mask.bool()].tolist() == list(range(int(mask.sum())))
