"""Small random models that read texts, in folders as their authors publish them."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

LABELS = ("contradiction", "neutral", "ENTAILMENT")
POSITIONS = 256


def config(**fields: Any) -> BertConfig:
    """Of a model whose weights are large enough to tell texts apart."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return BertConfig(
        **sizes,
        num_attention_heads=2,
        vocab_size=200,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,
        pad_token_id=0,
        **fields,
    )


def save_tokenizer(folder: Path) -> None:
    """A letter is a token."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


def classifier(folder: Path, labels: tuple[str, ...] = LABELS) -> Path:
    """A sequence classifier."""
    torch.manual_seed(19)  # one that says yes to some texts, and no to others
    names = dict(enumerate(labels))
    BertForSequenceClassification(config(num_labels=len(labels), id2label=names)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def encoder(folder: Path, pooling: dict[str, Any] | None = None, *extra: str) -> Path:
    """A folder of sentence-transformers; `extra`: modules after the normalisation."""
    torch.manual_seed(0)
    BertModel(config(), add_pooling_layer=False).save_pretrained(folder)
    save_tokenizer(folder)
    kinds = ("Transformer", "Pooling", "Normalize", *extra)
    paths = ("", "1_Pooling", "2_Normalize", *extra)
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    pooling = pooling or {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder
