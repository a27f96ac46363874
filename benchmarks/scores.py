"""Answers of several tokens: should their log-probabilities be summed or averaged, and on which scale? The bare base.

    python -m benchmarks.scores --data FOLDER

Of every test row's choices, by the answer's text: accuracy, NLL, ECE and signed gap of softmax(scores), with 95 %
bootstrap intervals. Nothing is fitted; posteriors start from here. Below, the evidence of 128 training rows for each
scale of the means (posterior/laplace/scale.py), which `posterior fit` weighs with log s ~ N(0, 1); also of sets whose
answers are single tokens, where the scale stays 1 unless --scale evidence asks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import read
from posterior.calibration.metrics import estimate
from posterior.data.examples import encode
from posterior.data.scoring import Scoring
from posterior.data.task import Task
from posterior.evaluation.predictions import map_scores
from posterior.evaluation.report import markdown
from posterior.laplace import scale
from posterior.models import lora
from posterior.models.base import load_model, load_tokenizer, resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with arc_easy/, openbookqa/, ...")
    parser.add_argument("--sets", nargs="+", default=["arc_easy", "openbookqa", "arc_challenge", "yelp", "sst2"])
    parser.add_argument("--seed", type=int, default=0, help="of the adapter's A")
    parser.add_argument("--test-rows", type=int, default=396, help="at most (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()
    base, device = resolve(), "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer: Any = load_tokenizer(base)
    model = load_model(base, getattr(torch, args.dtype), device).eval()
    model = lora.attach(model, base_id=base.id, seed=args.seed)  # with B = 0 it changes nothing
    for name in args.sets:
        data = read(name, args.data, 128, args.test_rows)
        examples = encode(Task("choice", data.template, data.answers, scoring=Scoring("sum")), tokenizer, data.test)
        y = torch.tensor([example.label for example in examples])
        lengths = torch.tensor([[len(tokens) for tokens in example.continuations] for example in examples])
        sums = map_scores(model, examples)
        table = {"sum": sums, "mean": sums / lengths}
        print(f"### {name}: {len(y)} rows, answers of {lengths.double().mean():.1f} tokens\n")
        print(markdown({way: estimate(scores.softmax(1), y) for way, scores in table.items()}, len(y)), end="\n\n")
        train = encode(Task("choice", data.template, data.answers), tokenizer, data.train)
        found = scale.evidences(model, train, batch_size=8)
        print("| scale | evidence, nats |\n|---|---|")
        print("".join(f"| {s:.3f} | {value:.1f} |\n" for s, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
