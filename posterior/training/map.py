"""MAP LoRA: theta* = argmin - sum_n log p(y_n|x_n, theta) + sum_m (lambda_m / 2) |theta_m - theta_0,m|^2.

The Gaussian prior is a term of the loss, scaled 1/N as the likelihood is a mean; it is not AdamW's decoupled decay,
which is another objective. When the examples carry a spread (laplace/gaussian.py), log p is its expectation over the
posterior of the scores, and theta* the mean of a variational posterior instead of a mode. A training state is saved
after each epoch and resumed exactly: data order and dropout depend on (seed, epoch) only.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from posterior.data.examples import Batch, Examples, batches, shuffled
from posterior.errors import PosteriorError
from posterior.files import atomic
from posterior.files.tensors import save_file
from posterior.likelihood.scores import log_likelihood
from posterior.models import lora

STATE = "state.safetensors"  # a checkpoint; its numbers are in the metadata


@dataclass(frozen=True)
class Training:
    """learning_rate: peak of a linear warm-up (5 %) and decay to zero; steps: stop after so many instead of whole
    epochs."""

    learning_rate: float = 1e-3
    epochs: int = 8
    steps: int | None = None
    batch_size: int = 8
    seed: int = 0

    def total_steps(self, rows: int) -> int:
        return self.steps if self.steps is not None else self.epochs * math.ceil(rows / self.batch_size)


class Trainer:
    """MAP training that can be advanced epoch by epoch, so that the prior precision can be updated in between."""

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")  # what the optimiser keeps of each parameter

    def __init__(self, model: nn.Module, examples: Examples, precision: Mapping[str, float], training: Training):
        self.model, self.examples, self.training = model, examples, training
        self.precision = dict(precision)
        self.matrices = lora.matrices(model)
        self.origin = lora.get(model)
        self.parameters: dict[str, Tensor] = {name: module.weight for name, module in self.matrices.items()}
        adam = torch.optim.Adam(list(self.parameters.values()), lr=training.learning_rate)
        self.optimizer: torch.optim.Optimizer = adam
        self.step = 0
        self.epoch = 0
        self.history: list[dict[str, float]] = []  # an entry each epoch
        self.total = training.total_steps(len(examples))

    @property
    def done(self) -> bool:
        return self.step >= self.total

    def run_epoch(self, progress: Callable[[float], object] = lambda loss: None) -> float:
        """One pass over the data (or up to the last step); returns the mean negative log-likelihood per example in
        nats."""
        generator = torch.Generator().manual_seed(self.training.seed * 100_003 + self.epoch)
        torch.manual_seed(self.training.seed * 100_003 + self.epoch)
        order = shuffled(self.examples, self.training.batch_size, generator)
        for module in self.matrices.values():
            module.weight.requires_grad_(True)
        self.model.train()
        total, seen = 0.0, 0
        try:
            for indices, batch in batches(self.examples, self.training.batch_size, order=order):
                if self.done:
                    break
                nll = self.update(batch.to(next(iter(self.matrices.values())).weight.device))
                total, seen = total + nll * len(indices), seen + len(indices)
                progress(nll)
        finally:
            self.model.eval().requires_grad_(False)
        self.epoch += 1
        self.history.append({"nll": total / max(1, seen)})
        return total / max(1, seen)

    def update(self, batch: Batch) -> float:
        """One optimiser step; returns the mean negative log-likelihood of the batch in nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad(set_to_none=True)
        value = self.gradient(batch)
        if not math.isfinite(value):
            again = f": the checkpoint after epoch {self.epoch} would lead here again" if self.epoch else ""
            raise PosteriorError(
                f"the loss is {value} at step {self.step}; lower the learning rate (now {self.training.learning_rate}) "
                f"and begin anew{again}"
            )
        self.optimizer.step()
        self.step += 1
        return value

    def rate(self) -> float:
        """The learning rate of the next step."""
        warm_up = min(1.0, (self.step + 1) / max(1.0, 0.05 * self.total))
        return self.training.learning_rate * warm_up * (1 - self.step / self.total)

    def gradient(self, batch: Batch) -> float:
        """Leave in each matrix the gradient to descend; returns the mean negative log-likelihood of the batch."""
        nll = self.loss(batch)
        (nll + self.penalty() / len(self.examples)).backward()  # type: ignore[no-untyped-call]
        return float(nll.detach())

    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of the batch, nats per example."""
        return -log_likelihood(self.model, batch).mean()

    def penalty(self) -> Tensor:
        """Negative log prior up to a constant: sum_m (lambda_m / 2) |theta_m - theta_0,m|^2."""
        terms = [
            self.precision[name] / 2 * (module.weight - self.origin[name]).square().sum()
            for name, module in self.matrices.items()
        ]
        return torch.stack(terms).sum()

    def save(self, path: Path, fingerprint: str = "") -> None:
        """Write a checkpoint, with the mark of the fit it belongs to; a crash leaves the previous one."""
        numbers = {"step": self.step, "epoch": self.epoch, "precision": self.precision, "history": self.history}
        metadata = {"fingerprint": fingerprint, "numbers": json.dumps(numbers)}
        tensors = {key: value.cpu().contiguous() for key, value in self.state().items()}
        atomic.write(path, lambda part: save_file(tensors, part, metadata))

    def resume(self, path: Path, fingerprint: str = "") -> bool:
        """Continue from a checkpoint written by `save`; False where there is none of this fit."""
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return False
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
        numbers = json.loads(metadata["numbers"])
        self.step, self.epoch, self.precision = numbers["step"], numbers["epoch"], numbers["precision"]
        self.history = numbers["history"]
        self.restore(tensors)
        return True

    def state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        tensors = {f"theta/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        tensors |= {f"origin/{name}": value for name, value in self.origin.items()}
        tensors |= {f"spread/{i}": e.spread for i, e in enumerate(self.examples) if e.spread is not None}
        for name, parameter in self.parameters.items():
            tensors |= {f"{key}/{name}": self.optimizer.state[parameter][key] for key in self.moments}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave; `step` is already the checkpoint's."""
        for name, value in self.origin.items():
            value.copy_(tensors[f"origin/{name}"])
        rows = [replace(e, spread=tensors.get(f"spread/{i}")) for i, e in enumerate(self.examples)]
        self.examples = replace(self.examples, rows=rows)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"theta/{name}"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                **{key: tensors[f"{key}/{name}"].to(parameter) for key in self.moments},
            }


@dataclass(frozen=True)
class Checkpoint:
    """Where a fit's training states are kept, and the mark of the fit they belong to."""

    folder: Path
    fingerprint: str

    def __truediv__(self, name: str) -> Checkpoint:
        """The same for one of several trainings of a fit."""
        return Checkpoint(self.folder / name, self.fingerprint)

    def save(self, trainer: Trainer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save(self.folder / STATE, self.fingerprint)

    def resume(self, trainer: Trainer) -> None:
        """Continue from the last state if it is of the same fit. Raises PosteriorError for one that is damaged."""
        try:
            resumed = trainer.resume(self.folder / STATE, self.fingerprint)
        except (SafetensorError, ValueError, KeyError) as error:
            raise PosteriorError(
                f"the checkpoint {self.folder / STATE} is damaged ({type(error).__name__}); delete it and begin anew"
            ) from None
        if resumed:
            print(f"resuming from {self.folder} at step {trainer.step} of {trainer.total}")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other fits away from this folder; when the block succeeds, nothing is left of it.

        Raises PosteriorError where another fit is at work on it.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic.locked(self.folder, wait=False):
            yield
            shutil.rmtree(self.folder, ignore_errors=True)

    def complete(
        self,
        trainer: Trainer,
        after_epoch: Callable[[], object] = lambda: None,
        shown: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        """Train to the end from the last state, if there is one, with a progress bar that says what is `shown`, too."""
        self.resume(trainer)
        with tqdm(total=trainer.total, initial=trainer.step, desc="training", unit="step") as bar:

            def progress(loss: float) -> None:
                bar.update()
                bar.set_postfix({"nll": f"{loss:.3f}", **shown()})

            while not trainer.done:
                trainer.run_epoch(progress)
                after_epoch()
                self.save(trainer)
