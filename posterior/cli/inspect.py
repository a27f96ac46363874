"""`posterior inspect`: verify a posterior folder and say what is in it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping

from posterior.models import lora
from posterior.storage import artefact

ANSWERS = {"choice": "each row's choices", "decision": "each question's options", "text": "any text"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Verify a posterior folder (format, hashes, shapes, finite values) and describe it."
    parser.add_argument("posterior", help="a posterior folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> None:
    facts = describe(artefact.load(args.posterior))
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    print("\n".join(lines(facts)))


def lines(facts: Mapping[str, object]) -> Iterator[str]:
    """One fact a line, what is inside another below it and further in; numbers to five digits."""
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield key
            yield from (f"  {line}" for line in lines(value))
        else:
            yield f"{key:<{width}}  {f'{value:.5g}' if isinstance(value, float) else value}"


def describe(posterior: artefact.Posterior) -> dict[str, object]:
    """What a person asks first, in order."""
    theta = lora.read_adapter(posterior.map_dir)
    parameters, base = sum(value.numel() for value in theta.values()), posterior.base
    records = len(posterior.calibration) + len(posterior.texts)
    facts: dict[str, object] = {
        "posterior": f"{posterior.name}@{posterior.hash[:12]} (verified)",
        "family": posterior.family,
        "base": f"{base['id']} (revision {base['revision']}, weights {base['hash'][:19]})",
        "task": posterior.task.kind,
        "template": repr(posterior.task.template) + (" as a chat message" if posterior.task.chat else ""),
        "answers": posterior.task.answers or ANSWERS[posterior.task.kind],
        "scores": f"{posterior.task.scoring.tokens} of an answer's log-probabilities, token by token, "
        f"times {posterior.task.scoring.scale:g}",
        "adapter": f"{len(theta)} matrices, {parameters:,} parameters, rank {posterior.lora['r']}",
        "prior": posterior.prior,
        "fit": posterior.fit,
        "calibration": f"{records} record{'' if records == 1 else 's'}",
        "probes": "none" if posterior.probes is None else f"{len(posterior.probes.rows)} rows",
    }
    if posterior.family == "particles":
        facts["particles"] = len(posterior.weights)
    else:
        facts["draws"] = f"{posterior.width:.2f} times as wide as the Gaussian"
    return facts
