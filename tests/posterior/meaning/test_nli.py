"""Meanings by entailment, with a random classifier: against transformers, a pair at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from posterior.errors import PosteriorError
from posterior.meaning.greedy import grouped
from posterior.meaning.nli import Nli
from tests.posterior.meaning import tiny

QUESTION = "Where is it?"
TEXTS = [f"{word} {number}" for word in ("in Paris", "London", "a town") for number in range(14)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.classifier(tmp_path_factory.mktemp("nli"))


def alone(folder: Path, pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether the first of each pair entails the second, a pair at a time."""
    tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModelForSequenceClassification))
    with torch.no_grad():
        logits = [model(**tokenizer(*pair, return_tensors="pt")).logits[0] for pair in pairs]
    assert model.config.id2label[2] == "ENTAILMENT"
    return [int(row.argmax()) == 2 for row in logits]


@pytest.mark.parametrize("question", [QUESTION, ""])
def test_the_same_if_each_entails_the_other(folder: Path, question: str) -> None:
    before = f"{question} " if question else ""
    first, *others = [before + text for text in TEXTS]
    forth = alone(folder, [(first, other) for other in others])
    back = alone(folder, [(other, first) for other in others])
    expected = [one and other for one, other in zip(forth, back, strict=True)]
    assert 0 < sum(expected) < sum(forth) < len(others), "some are the same, some are entailed in one direction"
    assert Nli(folder)(question, TEXTS[0], TEXTS[1:]) == expected
    assert len(set(grouped(question, TEXTS, Nli(folder)))) > 1


def test_the_question_counts(folder: Path) -> None:
    nli = Nli(folder)
    assert nli("", TEXTS[0], TEXTS[1:]) != nli(QUESTION, TEXTS[0], TEXTS[1:])
    assert nli(QUESTION, TEXTS[0], []) == []


def test_a_pair_that_is_longer_than_the_model_reads_is_refused(folder: Path) -> None:
    nli = Nli(folder)
    room = tiny.POSITIONS - 3  # [CLS] and two [SEP]
    assert len(nli("", "a " * (room - 60), ["b " * 60])) == 1
    with pytest.raises(PosteriorError, match=r"a pair of texts, .* has 257 tokens; .* reads 256 tokens: .* shorter"):
        nli("", "a " * (room - 60), ["b " * 61])
    with pytest.raises(PosteriorError, match="has 100002 characters"):
        nli("a" * 50_000, "", [""])


@pytest.mark.parametrize(
    "labels", [("LABEL_0", "LABEL_1"), ("contradiction", "not_entailment"), ("entailment", "Entailed", "neutral")]
)
def test_a_classifier_without_entailment_is_refused(tmp_path: Path, labels: tuple[str, ...]) -> None:
    with pytest.raises(
        PosteriorError, match=rf"has the classes \[.*'{labels[1]}'.*\]; one must be called 'entailment'"
    ):
        Nli(tiny.classifier(tmp_path, labels))


def test_other_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PosteriorError, match=r"nowhere cannot be loaded: .*model\.safetensors"):
        Nli(tmp_path / "nowhere")
    with pytest.raises(PosteriorError, match="lacks 4 weights of a BertForSequenceClassification"):
        Nli(tiny.encoder(tmp_path / "encoder"))
    pickled = tmp_path / "pickled"
    tiny.save_tokenizer(pickled)
    model = BertForSequenceClassification(BertConfig.from_pretrained(folder))
    model.config.save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(PosteriorError, match=r"cannot be loaded: .*expected a Hugging Face folder with .*safetensors"):
        Nli(pickled)
