"""Meanings by sentence embeddings, with a random encoder: against transformers, a text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from posterior.errors import PosteriorError
from posterior.meaning import embedding
from posterior.meaning.embedding import Embedding
from tests.posterior.meaning import tiny

TEXTS = [f"{word} {number}"[: 7 + number] for word in ("Paris, France", "London", "a town") for number in range(14)]
CLS = {"embedding_dimension": 16, "pooling_mode": "cls"}  # as newer folders say it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.encoder(tmp_path_factory.mktemp("embedding"))


def alone(folder: Path, pooling: str) -> Tensor:
    """[n, d] of the texts, one at a time."""
    tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModel))
    rows = []
    with torch.no_grad():
        for text in TEXTS:
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            vector = states[0] if pooling == "cls" else states.mean(0)
            rows.append(vector / vector.square().sum().sqrt())
    return torch.stack(rows)


@pytest.mark.parametrize(("pooling", "said"), [("mean", None), ("cls", CLS), ("cls", {"pooling_mode_cls_token": True})])
def test_vectors_and_cosines_are_those_of_transformers(
    tmp_path: Path, pooling: str, said: dict[str, Any] | None
) -> None:
    folder = tiny.encoder(tmp_path, said)
    expected = alone(folder, pooling)
    cosines = expected[1:] @ expected[0]
    middle = float(cosines.sort().values[20:22].mean())
    model = Embedding(folder, middle)
    assert torch.allclose(model.vectors(TEXTS), expected, atol=1e-5)
    same = model("What is it?", TEXTS[0], TEXTS[1:])
    assert same == (cosines >= middle).tolist() and 0 < sum(same) < len(same)


def test_vectors_are_remembered_and_forgotten(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = Embedding(folder, 0.9), list[str]()
    compute = model.vectors

    def noted(texts: Sequence[str]) -> Tensor:
        read.extend(texts)
        return compute(texts)

    monkeypatch.setattr(model, "vectors", noted)
    monkeypatch.setattr(embedding, "KEPT", 4)
    first = model("", "a", ["b", "c", "b"])
    assert read == ["a", "b", "c"] and model("", "a", ["b", "c", "b"]) == first and len(read) == 3
    again = model("", "a", ["d", "e"])
    assert read[3:] == ["a", "d", "e"] and again == Embedding(folder, 0.9)("", "a", ["d", "e"])


def test_a_folder_without_modules_is_averaged(folder: Path, tmp_path: Path) -> None:
    plain = tiny.encoder(tmp_path)
    (plain / "modules.json").unlink()
    assert torch.allclose(Embedding(plain).vectors(TEXTS), Embedding(folder).vectors(TEXTS), atol=1e-6)


def test_a_text_that_is_longer_than_the_model_reads_is_refused(folder: Path) -> None:
    model = Embedding(folder)
    assert len(model("", "a", ["b" * 62])) == 1
    with pytest.raises(PosteriorError, match=r"a text has 65 tokens; .* reads 64 tokens: ask for shorter texts"):
        model("", "a", ["b" * 63])


@pytest.mark.parametrize(
    ("pooling", "words"),
    [
        ({"pooling_mode": "max"}, r"pools by \['max'\]; expected 'mean' or 'cls'"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, r"pools by \['mean', 'cls'\]"),
        ({"pooling_mode_max_tokens": True}, r"pools by \['pooling_mode_max_tokens'\]"),
        ({"word_embedding_dimension": 16}, r"pools by \[\]"),
    ],
)
def test_other_poolings_are_refused(tmp_path: Path, pooling: dict[str, Any], words: str) -> None:
    with pytest.raises(PosteriorError, match=words):
        Embedding(tiny.encoder(tmp_path, pooling))


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PosteriorError, match=r"has the modules \['Transformer', 'Pooling', 'Normalize', 'Dense'\]"):
        Embedding(tiny.encoder(tmp_path / "dense", None, "Dense"))
    with pytest.raises(PosteriorError, match="cannot be loaded"):
        Embedding(tmp_path / "nowhere")
    broken = tiny.encoder(tmp_path / "broken")
    for name, content in (("1_Pooling/config.json", "[]"), ("modules.json", "{}"), ("modules.json", "[[")):
        (broken / name).write_text(content)
        with pytest.raises(PosteriorError, match=r"the modules|no whole folder"):
            Embedding(broken)
