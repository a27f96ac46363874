"""Tiny tokenizers with the habits of real ones: prefix spaces, BOS, EOS."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
PIECES = [SPACE, "a", "b", "c", f"{SPACE}a", f"{SPACE}b", "ab", f"{SPACE}ab", f"{SPACE}{SPACE}"]
MERGES = [(SPACE, "a"), (SPACE, "b"), ("a", "b"), (f"{SPACE}a", "b"), (SPACE, SPACE)]
KINDS = ("byte-level", "byte-level, prefix", "always", "first", "never", "legacy")
EDGES = ("none", "bos", "eos", "both")


def make(kind: str, edges: str = "none") -> PreTrainedTokenizerFast:
    """`kind` says how text begins, one of KINDS; `edges` what is added around a text, one of EDGES."""
    if kind.startswith("byte-level"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens, merges = ["<s>", "</s>", *alphabet, "Ġa", "ab"], [("Ġ", "a"), ("a", "b")]
        backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind.endswith("prefix"))
        backend.decoder = decoders.ByteLevel()
    else:
        tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
        backend = Tokenizer(
            models.BPE({token: index for index, token in enumerate(tokens)}, MERGES, byte_fallback=True, fuse_unk=True)
        )
        if kind == "legacy":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=kind, split=False)
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps + ([] if kind == "never" else [decoders.Strip(" ", 1, 0)]))
    single = [*(["<s>"] if edges in ("bos", "both") else []), "$A", *(["</s>"] if edges in ("eos", "both") else [])]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
