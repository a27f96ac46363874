"""Whole models as LoRA: the checkpoint of a full fine-tune, of GaLore or of a last layer becomes an adapter.

The difference of each linear matrix to the base's is cut to its r largest singular values:
    W - W_0 = U S V^T,  A = S_r^1/2 V_r^T  [r, in],  B = U_r S_r^1/2  [out, r],  alpha = r
Of all matrices of rank r, B A is the nearest to W - W_0, at a distance of the root of the sum of the squared singular
values that are left out (Eckart and Young 1936). Everything else of the checkpoint must be as it is in the base: an
adapter holds no biases, norms, embeddings or added layers.

One tensor of the base and one of the checkpoint are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from tqdm import tqdm

from posterior.errors import PosteriorError, first_line
from posterior.models import servable
from posterior.models.lora import Theta
from posterior.models.weights import TOKENIZERS, Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANK = 8
SHOWN = 3  # names in an error
ITS_BASE = "name the base that it was trained from"
# Of the configuration, what changes no answer's probability.
HARMLESS = ("_name_or_path", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "transformers_version",
            "use_cache")  # fmt: skip
# safetensors' names of the types that are compared: each holds the values of those that it lists.
DTYPES = {"F32": ("F32", "F16", "BF16"), "F16": ("F16",), "BF16": ("BF16",)}


@dataclass(frozen=True)
class Checkpoint:
    """A whole model beside its base. changed: the modules whose matrix [out, in] differs, in the model's order."""

    folder: Path
    own: Tensors
    base: Tensors
    changed: tuple[str, ...]

    def difference(self, module: str) -> Tensor:
        """W - W_0 [out, in] in float32."""
        name = f"{module}.weight"
        return self.own[name].float() - self.base[name].float()


@dataclass(frozen=True)
class Cut:
    """A checkpoint as an adapter. left, size: the Frobenius norms, by module, of what the adapter leaves out of the
    difference to the base and of that difference."""

    theta: Theta
    left: dict[str, float]
    size: dict[str, float]

    @property
    def errors(self) -> dict[str, float]:
        """The share of each module's difference that is left out, in Frobenius norms: 0 to 1."""
        return {module: _share(self.left[module], size) for module, size in self.size.items()}

    @property
    def error(self) -> float:
        """The same of all modules together."""
        return _share(math.hypot(*self.left.values()), math.hypot(*self.size.values()))


def read(folder: Path, base: Path, model: PreTrainedModel) -> Checkpoint:
    """The checkpoint of an HF folder. model: the base, loaded.

    Raises PosteriorError unless it is the base with other matrices in linear layers that can be adapted.
    """
    _check_folder(folder)
    _check_config(folder, base)
    own, before = Tensors(folder, "checkpoint"), Tensors(base)
    pairs = _paired(folder, own, before, _twins(model))
    differing = _differing(folder, own, before, pairs)
    inside = list(_inside(model))
    _check_adaptable(folder, differing, inside)
    return Checkpoint(folder, own, before, tuple(name for name in inside if f"{name}.weight" in differing))


def check_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[str]:
    """Warnings about the tokenizer of a checkpoint, if it has one: the base's is used.

    Raises PosteriorError where tokens have other numbers than the base's.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZERS):
        return []
    own: PreTrainedTokenizerBase = _loaded(AutoTokenizer, "tokenizer", folder)
    numbers = own.get_vocab()
    other = [token for token, number in tokenizer.get_vocab().items() if numbers.get(token) != number]
    if other:
        raise PosteriorError(
            f"{folder} gives {len(other)} tokens other numbers than the base ({_some(sorted(other))}); {ITS_BASE}"
        )
    if chat and own.chat_template not in (None, tokenizer.chat_template):
        return [f"{folder} has another chat template than the base; prompts are made by the base's"]
    return []


def cut(checkpoint: Checkpoint, modules: Sequence[str], rank: int) -> Cut:
    """The checkpoint as an adapter of these modules; one that it does not change gets zeros."""
    theta: Theta = {}
    left, size = {}, {}
    for module in tqdm(modules, desc=f"cutting {checkpoint.folder.name}", unit="matrix", leave=False):
        difference = checkpoint.difference(module)
        size[module] = _norm(difference)
        if size[module] > torch.finfo(torch.float32).max:
            raise PosteriorError(f"{checkpoint.folder} changes {module} by more than float32 holds; train it again")
        a, b = nearest(difference, rank)
        theta |= {f"{module}.A": a, f"{module}.B": b}
        left[module] = _norm(difference - b @ a)
    return Cut(theta, left, size)


def nearest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] in float32, whose product B A is the nearest to a matrix M [out, in] of all that have
    this rank. Where the matrix has fewer singular values, the rest is zero.

    U are the eigenvectors of M M^T, or V those of M^T M if that is smaller: a fifth of the time of M's own
    decomposition, and in float64 the squares lose less than float32 does of M.
    """
    if len(matrix) > matrix.shape[1]:
        b, a = nearest(matrix.mT, rank)
        return a.mT, b.mT
    exact = matrix.double()
    u = torch.linalg.eigh(exact @ exact.mT).eigenvectors.flip(1)[:, :rank]  # the largest first
    projected = u.mT @ exact  # S V^T
    root = projected.norm(dim=1).sqrt()
    a = projected / root.clamp(min=torch.finfo(root.dtype).tiny)[:, None]
    missing = rank - len(root)
    return pad(a, (0, 0, 0, missing)).float(), pad(u * root, (0, missing)).float()


@contextmanager
def in_place(model: nn.Module, checkpoint: Checkpoint) -> Iterator[None]:
    """Within, the base's model is the checkpoint."""
    try:
        _put(model, checkpoint.own, checkpoint.changed)
        yield
    finally:
        _put(model, checkpoint.base, checkpoint.changed)


def _inside(model: Any) -> Iterator[str]:
    """The linear layers that adapters of can be served: all but the head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head and not servable.VOCABULARY & set(name.split(".")):
            yield name


def _put(model: nn.Module, tensors: Tensors, modules: Sequence[str]) -> None:
    with torch.no_grad():
        for name in modules:
            model.get_parameter(f"{name}.weight").copy_(tensors[f"{name}.weight"])


def _share(left: float, size: float) -> float:
    return left / size if size else 0.0


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise PosteriorError(f"{folder} is a PEFT adapter, no whole model; import it as an adapter")
    if not (folder / "config.json").is_file():
        raise PosteriorError(
            f"{folder} is no whole model: it has no config.json; name a folder that save_pretrained() of transformers "
            "wrote"
        )
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise PosteriorError(
            f"{folder} holds pickled weights, which can run code and are refused; load it with transformers where you "
            "trust it, and save_pretrained() it again"
        )


def _check_config(folder: Path, base: Path) -> None:
    from transformers import AutoConfig

    own, expected = (_loaded(AutoConfig, "configuration", each).to_dict() for each in (folder, base))
    for key in sorted((own.keys() | expected.keys()) - set(HARMLESS)):
        if own.get(key) != expected.get(key):
            raise PosteriorError(
                f"{folder} has {key} {own.get(key)!r} in config.json, the base {base} {expected.get(key)!r}; {ITS_BASE}"
            )


def _loaded(kind: Any, part: str, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # transformers raises whatever a damaged file leads it to
        raise PosteriorError(f"the {part} of {folder} cannot be loaded: {first_line(error)}; copy it again") from error


def _twins(model: PreTrainedModel) -> dict[str, str]:
    """Tensors that are one in the model, such as tied embeddings and head: a file may hold either, or both."""
    tied: dict[str, str] = model.all_tied_weights_keys
    return tied | {source: target for target, source in tied.items()}


def _paired(folder: Path, own: Tensors, base: Tensors, twins: Mapping[str, str]) -> dict[str, str]:
    """{tensor of the checkpoint: the base's}. Raises PosteriorError for what only one of them has, and for tensors that
    cannot be compared."""

    def found(name: str, where: Tensors) -> str | None:
        return next((each for each in (name, twins.get(name)) if each in where), None)

    extra = [name for name in own if found(name, base) is None]
    if extra:
        raise PosteriorError(
            f"{folder} has {len(extra)} tensors that the base lacks ({_some(extra)}); serial adapters and other added "
            "layers are no change of the base's matrices: train without them"
        )
    missing = [name for name in base if found(name, own) is None]
    if missing:
        raise PosteriorError(
            f"{folder} lacks {len(missing)} tensors of the base ({_some(missing)}); copy it again, or {ITS_BASE}"
        )
    pairs = {name: found(name, base) or name for name in own}
    for name, other in pairs.items():
        if own.shape(name) != base.shape(other):
            raise PosteriorError(
                f"{folder} holds {name} as {list(own.shape(name))}, the base as {list(base.shape(other))}; {ITS_BASE}"
            )
        if base.dtype(other) not in DTYPES.get(own.dtype(name), ()):
            raise PosteriorError(
                f"{folder} holds {name} as {own.dtype(name)}, the base as {base.dtype(other)}; both must be F32, F16 "
                "or BF16, and the first must hold every number of the second: save it in the base's type or float32"
            )
    return pairs


def _differing(folder: Path, own: Tensors, base: Tensors, pairs: Mapping[str, str]) -> set[str]:
    """Tensors of the checkpoint with other values than the base's. Raises PosteriorError for one that is not finite."""
    found = set()
    for name, other in pairs.items():
        values = own[name]
        if not bool(torch.isfinite(values).all()):
            raise PosteriorError(f"{folder} holds a value in {name} that is not finite; train it again")
        if not torch.equal(values.float(), base[other].float()):
            found.add(name)
    return found


def _check_adaptable(folder: Path, differing: set[str], inside: Sequence[str]) -> None:
    """Raises PosteriorError where more differs than matrices of these linear layers."""
    adaptable = {f"{name}.weight" for name in inside}
    kinds: dict[str, list[str]] = {}
    for name in sorted(differing - adaptable):
        kinds.setdefault(_kind(name), []).append(name)
    if kinds:
        listed = "; ".join(f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items())
        raise PosteriorError(
            f"{folder} changes what a LoRA adapter cannot hold: {listed}; train it with these frozen, or put the "
            "base's own values back"
        )


def _kind(name: str) -> str:
    if name.endswith(".bias"):
        return "biases"
    if servable.VOCABULARY & set(name.split(".")):
        return "embeddings or heads"
    return "norms or other weights outside linear layers"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
