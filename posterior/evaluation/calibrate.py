"""`posterior calibrate`: labelled rows that were not fitted on in, a calibration record beside the posterior out."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from posterior.calibration import records
from posterior.calibration.metrics import Estimate, check, estimate
from posterior.calibration.records import (  # fmt: skip
    CALIBRATORS,
    FLOOR,
    MIN_ROWS,
    Conformal,
    Dtype,
    Key,
    Method,
    PredictiveName,
    Record,
    Score,
)
from posterior.cli.arguments import SIZES, add_evaluation, check_device, check_numbers
from posterior.data.examples import ROWS, Example, data_hash, encode
from posterior.data.reading import FORMATS, Row, read_rows
from posterior.errors import PosteriorError
from posterior.evaluation.evaluate import answer_count, base_spec, linearized, map_scores, markdown, sampled
from posterior.files import objects
from posterior.laplace import linearized as linear
from posterior.models import lora
from posterior.models.base import Base, context, load_model, load_tokenizer, resolve
from posterior.predictive.mixture import from_gaussian
from posterior.storage import artefact

FOLDS = 5  # of the cross-fitting: what is printed of a row comes from a calibration that did not see it
PARTICLES = 8  # of a Laplace posterior's mixture, as `posterior serve` draws them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Calibrate one predictive of a choice posterior on held-out rows; the server applies the record it writes."
    )
    parser.add_argument("posterior", help="a posterior folder")
    parser.add_argument("data", help=f"at least {MIN_ROWS} held-out rows like the training data: {FORMATS}")
    parser.add_argument(
        "--method",
        choices=tuple(CALIBRATORS),
        default="temperature",
        help="temperature: one number; vector: two an answer; platt, isotonic: of the top answer (default %(default)s)",
    )
    parser.add_argument(
        "--predictive", choices=("linearized", "mixture", "map"), help="which to calibrate (default: the served one)"
    )
    parser.add_argument(
        "--particles",
        type=int,
        help=f"of the mixture; another number is another calibration (default: {PARTICLES}, or all in the folder)",
    )
    parser.add_argument(
        "--conformal",
        choices=get_args(Score),
        default="lac",
        help="prediction sets: lac, the smallest on average; aps, larger where p is spread (default %(default)s)",
    )
    parser.add_argument(
        "--coverage",
        type=float,
        default=0.9,
        help="of the sets reported here; requests may ask for any (default %(default)s)",
    )
    add_evaluation(
        parser,
        dtype=None,
        default="what `posterior serve` computes this predictive in on this machine: linearized in float32 on a CPU "
        "and bfloat16 on CUDA; mixture and map in the base's own, bfloat16 if that is float32; a record is applied to "
        "no other",
    )


def run(args: argparse.Namespace) -> None:
    record, path = calibrate(args)
    if args.json:
        print(json.dumps(record.model_dump(mode="json")))
        return
    name, method = record.key.predictive, record.calibrator.method
    print(markdown({name: record.before, f"{name}, {method} (cross-fitted)": record.after}, record.n))
    print(
        f"\nprediction sets ({record.conformal.score}) at coverage {record.coverage:g}, cross-fitted: "
        f"covered {record.sets['covered']}, mean size {record.sets['size']}\nwrote {path}"
    )


def calibrate(args: argparse.Namespace) -> tuple[Record, Path]:
    """The record and where it was written. Raises PosteriorError for whatever the user can mend."""
    check_numbers(args, SIZES)
    check_device(args.device)
    posterior = artefact.load(args.posterior)
    posterior.check_open()
    rows = read_rows(args.data)
    predictive, k = _check(posterior, rows, args)
    base = resolve(args.base or base_spec(posterior.base))
    posterior.check_base(base.hash)
    tokenizer: Any = load_tokenizer(base)
    longest = context(base)
    limit = f"the base's context of {longest}"
    examples = encode(posterior.task, tokenizer, rows, longest=longest, limit=limit, source=args.data)
    seen = posterior.trained_on(examples)
    if seen:
        raise PosteriorError(
            f"{seen} of the {len(rows)} rows are rows that {posterior.name!r} was fitted on; calibrate on others"
        )
    y = torch.tensor([example.label for example in examples])
    answers, count = posterior.task.answers, answer_count(examples)
    if answers and len(set(y.tolist())) == 1:
        raise PosteriorError(
            f"every row has the label {answers[int(y[0])]!r}; a calibration needs rows of at least two answers"
        )
    dtype = args.dtype or served_dtype(predictive, base, args.device)
    model = lora.load_peft(load_model(base, getattr(torch, dtype), args.device), posterior.map_dir).eval()
    p = probabilities(model, posterior, predictive, k, examples, args.batch_size)
    record = measure(
        p,
        y,
        method=args.method,
        score=args.conformal,
        coverage=args.coverage,
        key=Key(
            base=base.hash,
            posterior=posterior.hash,
            template=records.template_hash(posterior.task),
            predictive=predictive,
            particles=k,
            dtype=dtype,
            answers=None if answers else count,
        ),
        data=data_hash(rows),
    )
    return record, posterior.add(record)


def served_dtype(predictive: PredictiveName, base: Base, device: str) -> Dtype:
    """What `posterior serve`, without --dtype, computes a predictive in."""
    if predictive == "linearized":
        return linear.dtype_on(device)
    config = objects.read(base.path / "config.json")
    for part in (config, config.get("text_config") or {}):
        own = part.get("dtype") or part.get("torch_dtype")
        if own in ("bfloat16", "float16"):
            return own  # type: ignore[no-any-return]
    return "bfloat16"  # vLLM halves float32


def probabilities(
    model: Any,
    posterior: artefact.Posterior,
    predictive: PredictiveName,
    k: int,
    examples: Sequence[Example],
    batch_size: int = ROWS,
) -> Tensor:
    """The predictive's probabilities [N, C], float64, as the server computes them."""
    if predictive == "linearized":
        return linearized(model, posterior.law, examples, batch_size).probability
    if predictive == "mixture":
        return sampled(model, posterior, k, examples, batch_size).probability
    return map_scores(model, examples, batch_size).softmax(1)


def measure(p: Tensor, y: Tensor, *, method: Method, score: Score, coverage: float, key: Key, data: str) -> Record:
    """Fit on all rows, and say by cross-fitting what it is worth. p: [N, C] float64; y: [N]."""
    check(p)
    if method == "temperature" and bool((p.argmax(1) == y).all()):
        raise PosteriorError(
            f"all {len(y)} answers are right, so that no temperature is low enough; "
            "give more rows, or use --method platt, which allows for mistakes not seen yet"
        )
    after, sets = cross_fit(p, y, method=method, score=score, coverage=coverage)
    return Record(
        key=key,
        calibrator=CALIBRATORS[method].fit(p, y),
        conformal=Conformal.fit(score, p, y),
        n=len(y),
        data=data,
        before=_defined(estimate(p.clamp(min=FLOOR), y)),
        after=_defined(estimate(after.clamp(min=FLOOR), y)),
        coverage=coverage,
        sets={"covered": _share(sets.gather(1, y[:, None])), "size": _mean(sets.sum(1))},
    )


def cross_fit(p: Tensor, y: Tensor, *, method: Method, score: Score, coverage: float) -> tuple[Tensor, Tensor]:
    """Calibrated probabilities and prediction sets, both [N, C], each row's from the other folds' rows."""
    from sklearn.model_selection import KFold

    after, sets = torch.zeros_like(p), torch.zeros(p.shape, dtype=torch.bool)
    for others, fold in KFold(FOLDS, shuffle=True, random_state=0).split(p):
        calibrator = CALIBRATORS[method].fit(p[others], y[others])
        conformal = Conformal.fit(score, p[others], y[others])
        after[fold] = calibrator.apply(p[fold])
        sets[fold] = records.prediction_set(calibrator, conformal, p[fold], coverage)
    return after, sets


def _check(posterior: artefact.Posterior, rows: Sequence[Row], args: argparse.Namespace) -> tuple[PredictiveName, int]:
    """The predictive and its number of particles. Raises PosteriorError for what cannot be calibrated."""
    if posterior.task.kind != "choice":
        raise PosteriorError(f"{posterior.name!r} is a text posterior; only candidate answers are calibrated")
    if posterior.task.answers is None and args.method == "vector":
        raise PosteriorError(
            f"each row of {posterior.name!r} brings its own answers, but --method vector learns a bias of each answer; "
            "use temperature, platt or isotonic"
        )
    if not 0 < args.coverage < 1:
        raise PosteriorError(f"--coverage is {args.coverage}; it must lie between 0 and 1")
    if len(rows) < MIN_ROWS:
        raise PosteriorError(
            f"{len(rows)} rows are too few to calibrate on: below {MIN_ROWS}, not even the largest score bounds 95 % "
            f"of all cases with 95 % confidence (0.95^{len(rows)} = {0.95 ** len(rows):.3f} > 0.05)"
        )
    laplace = posterior.family == "laplace"
    predictive: PredictiveName = args.predictive or ("linearized" if laplace else "mixture")
    if predictive == "linearized" and not laplace:
        raise PosteriorError(f"{posterior.name!r} is made of particles, it has no linearized predictive; use mixture")
    if predictive != "mixture" and args.particles is not None:
        raise PosteriorError(f"--particles belongs to --predictive mixture; this is {predictive}")
    return predictive, _particles(posterior, predictive, args.particles)


def _particles(posterior: artefact.Posterior, predictive: PredictiveName, wanted: int | None) -> int:
    """What an answer of this predictive says as `particles`."""
    if predictive == "map":
        return 1
    if predictive == "linearized":
        return from_gaussian(torch.zeros(2), torch.zeros(2, 2)).particles
    k = (len(posterior.weights) or PARTICLES) if wanted is None else wanted
    if posterior.weights and k > len(posterior.weights):
        raise PosteriorError(f"--particles is {k}; {posterior.name!r} has {len(posterior.weights)}")
    return k


def _defined(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Without those that have no value on these rows, like the AUROC where every answer is right."""
    return {name: each for name, each in estimates.items() if not math.isnan(each.value)}


def _share(hits: Tensor) -> Estimate:
    """A share of rows with its exact binomial interval (Clopper & Pearson 1934)."""
    from scipy.stats import binomtest

    found = binomtest(int(hits.sum()), hits.numel())
    low, high = found.proportion_ci()
    return Estimate(float(found.statistic), float(low), float(high))


def _mean(values: Tensor) -> Estimate:
    """A mean over rows with its bootstrap interval."""
    from scipy.stats import bootstrap

    found = bootstrap((values.numpy(),), np.mean, n_resamples=1000, method="percentile", rng=0)
    low, high = found.confidence_interval
    return Estimate(float(values.double().mean()), float(low), float(high))
