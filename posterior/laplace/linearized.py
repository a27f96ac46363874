"""The linearised predictive: f(x) ~ N(f*(x), J P^-1 J^T) over the candidates' scores, exact under the Laplace
covariance.

The softmax ignores a common shift of the scores, so only differences to one candidate matter: C - 1 backward passes,
and fewer of many candidates (posterior/likelihood/directions.py). No Jacobian over base weights ever exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from posterior.curvature.diagonal import by_example
from posterior.data.candidates import Candidates
from posterior.data.examples import ROWS, TOKENS, Batch, Example, Examples, batches, collate
from posterior.data.task import Task
from posterior.errors import PosteriorError
from posterior.laplace import blockwise
from posterior.likelihood.directions import differences, directions, movements, remainder
from posterior.likelihood.footprint import Footprint, measure
from posterior.likelihood.scores import arranged, record, scores
from posterior.models import lora
from posterior.models.base import Base, load_model
from posterior.models.devices import Dtype
from posterior.predictive.mixture import Predictive, from_gaussian

if TYPE_CHECKING:
    from peft import PeftModel


def dtype_on(device: str) -> Dtype:
    """What the server computes linearised predictives in: a GPU has no room for float32, a CPU no speed from less."""
    return "float32" if device == "cpu" else "bfloat16"


def moments(
    model: nn.Module,
    matrices: Mapping[str, nn.Linear],
    covariance: blockwise.Covariance,
    batch: Batch,
    factors: Sequence[float] = (1.0,),
) -> tuple[Tensor, Tensor]:
    """Mean [B, C] of the scores and, at M multiples of the prior precision, covariance [M, B, C, C] of the scores
    relative to one candidate's, whose row and column are 0: the first, or of many the most probable. float64. Matrices
    that `covariance` does not name are certain."""
    f, parts = jacobians(model, {name: matrices[name] for name in covariance.precision}, batch, directions)
    found = covariance.of_scores(parts, factors)
    moved = movements(f).to(found)
    found = moved @ found @ moved.mT
    return f, found + torch.diag_embed(remainder(f, found))


def jacobians(
    model: nn.Module,
    matrices: Mapping[str, nn.Linear],
    batch: Batch,
    wanted: Callable[[Tensor], Tensor] = differences,
) -> tuple[Tensor, Iterator[tuple[str, Tensor]]]:
    """Scores f [B, C] in float64, and the Jacobians [B, D, r, d] of the combinations of them that `wanted(f)` [B, D, C]
    holds, a matrix at a time, oriented as lora.orient has them."""
    batch = arranged(model, batch)
    found: list[dict[str, Tensor]] = []  # of each combination [B, r, d]: gradients at all positions take more memory
    with record(dict(matrices)) as tape:
        f = scores(model, batch)
        cotangents = wanted(f.detach()).to(f).unbind(1)
        for number, cotangent in enumerate(cotangents, 1):
            gradients = tape.gradients(f, cotangent, keep=number < len(cotangents))
            found.append({name: _jacobian(name, tape.inputs[name], gradients.pop(name), batch) for name in matrices})
    return f.detach().double(), ((name, torch.stack([each[name] for each in found], 1)) for name in matrices)


def _jacobian(name: str, inputs: Tensor, gradient: Tensor, batch: Batch) -> Tensor:
    """A matrix's gradient for each example, [B, r, d], from those at its outputs."""
    a, g = by_example(inputs, gradient, batch)
    return lora.orient(name, g.mT @ a)


def predictives(
    model: nn.Module, matrices: Mapping[str, nn.Linear], covariance: blockwise.Covariance, batch: Batch
) -> list[Predictive]:
    """The linearised predictive of each example of a batch of choices."""
    mean, (spread,) = moments(model, matrices, covariance, batch)
    return [from_gaussian(f, each) for f, each in zip(mean.cpu(), spread.cpu(), strict=True)]


class Linearizable(Protocol):
    """What of a Laplace posterior the linearised predictive needs: the PEFT folder of theta*, the covariance, the
    task."""

    @property
    def map_dir(self) -> Path: ...
    @property
    def covariance(self) -> blockwise.Covariance: ...
    @property
    def task(self) -> Task: ...


class LinearizedModel:
    """The base with the MAP adapters of Laplace posteriors, ready to give the moments of scores.

    footprints: what those take, by posterior. Posteriors come and go; without one, the base is not held."""

    def __init__(
        self,
        base: Base,
        posteriors: Mapping[str, Linearizable],
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ):
        self.device = device
        self.parts: dict[str, tuple[dict[str, nn.Linear], blockwise.Covariance, Task]] = {}
        self.adapters: dict[str, str] = {}
        self.footprints: dict[str, Footprint] = {}
        self._base, self._dtype = base, dtype
        self._model: PeftModel | None = None
        self._numbers = count()
        for name, posterior in posteriors.items():
            self.add(name, posterior)

    def add(self, name: str, posterior: Linearizable) -> Footprint:
        """Hold one more posterior, in the place of one of this name; returns what its moments take. Raises
        PosteriorError where its adapter does not fit the base."""
        self.remove(name)
        adapter = f"p{next(self._numbers)}"
        if self._model is None:
            base = load_model(self._base, self._dtype, self.device)
            self._model = lora.load_peft(base, posterior.map_dir, name=adapter).eval()
        else:
            self._model.load_adapter(str(posterior.map_dir), adapter_name=adapter, is_trainable=False)
        matrices, covariance = lora.matrices(self._model, adapter), posterior.covariance.to(self.device)
        self.parts[name], self.adapters[name] = (matrices, covariance, posterior.task), adapter
        model = self._with(name)
        self.footprints[name] = measure(model, {each: matrices[each] for each in covariance.precision}, self.device)
        return self.footprints[name]

    def remove(self, name: str) -> None:
        """Forget a posterior, if it is held."""
        adapter = self.adapters.pop(name, None)
        if adapter is None or self._model is None:
            return
        del self.parts[name]
        self.footprints.pop(name, None)
        if not self.adapters:
            self._model = None
            return
        self._model.set_adapter(next(iter(self.adapters.values())))  # PEFT warns where an active one is deleted
        self._model.delete_adapter(adapter)

    def _with(self, name: str) -> PeftModel:
        """The model with this posterior's adapter. Raises PosteriorError for one that is not held."""
        if self._model is None or name not in self.adapters:
            raise PosteriorError(f"the linearised predictive holds no posterior {name!r}")
        self._model.set_adapter(self.adapters[name])
        self._model.requires_grad_(False)
        return self._model

    def logits(
        self,
        name: str,
        prompts: Sequence[Sequence[int]],
        candidates: Sequence[Candidates],
        room: float = math.inf,
    ) -> list[tuple[Tensor, Tensor]]:
        """(mean [C], covariance [C, C]) in float64 on the CPU for each prompt with its candidates, in order.

        A batch that would take more than `room` bytes, or more than there are, is halved. Raises MemoryError for a
        single prompt that finds no memory.
        """
        model = self._with(name)
        _, _, task = self.parts[name]
        rows = [Example(tuple(prompt), answers, 0) for prompt, answers in zip(prompts, candidates, strict=True)]
        examples = Examples(rows, task.scoring)
        results: dict[int, tuple[Tensor, Tensor]] = {}
        waiting = [indices for indices, _ in batches(examples, ROWS, tokens=TOKENS)]
        while waiting:
            indices = waiting.pop()
            chosen = examples.take(indices)
            found = None
            if len(chosen) == 1 or sum(map(self.footprints[name].bytes, chosen)) <= room:
                found = self._moments(model, name, chosen)
            if found is not None:
                results.update(zip(indices, found, strict=True))
            elif len(chosen) == 1:
                raise MemoryError(f"no memory for the moments of {chosen[0].length} tokens")
            else:
                waiting += [indices[: len(indices) // 2], indices[len(indices) // 2 :]]
        return [results[index] for index in range(len(examples))]

    def _moments(self, model: PeftModel, name: str, examples: Examples) -> list[tuple[Tensor, Tensor]] | None:
        """Moments of one batch; None if there is no memory for it."""
        matrices, covariance, _ = self.parts[name]
        try:
            mean, (spread,) = moments(model, matrices, covariance, collate(examples).to(self.device))
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            return None  # only now, without the error's traceback, are the batch's tensors freed
        return list(zip(mean.cpu(), spread.cpu(), strict=True))


def _out_of_memory(error: Exception) -> bool:
    """The CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
