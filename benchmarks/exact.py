"""Is text under the mixture exact? Greedy text in float32 against transformers + peft, token by token.

    python -m benchmarks.exact          K = 4, 20 prompts, 64 tokens, both mixings (minutes on 2 cores)

All texts are written at once, so that each has company. The reference reads each text again under each adapter, mixes
by a loop and must choose the same tokens, with the mixture's probabilities and the weights within 1e-4. Ends with
status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.decode import TOPICS
from benchmarks.engines import configured, running_engine, wait_passively
from posterior.models import base
from posterior.predictive.decoding import Mixing
from server.engine import Adapter
from server.engine.config import set_environment
from server.engine.gang import Trace
from server.services.texts import predictive_of
from tests.server.mixture import Reference, mixture

TARGET = 1e-4
OPENINGS = ("Tell me something about {}.", "Once upon a time, in a town known for {},")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="as for `posterior serve`")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=20, help="at most 20")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    wait_passively("benchmarks.exact")
    set_environment("cpu")
    sys.exit(asyncio.run(run(args)))


async def run(args: argparse.Namespace) -> int:
    model = base.resolve(args.base)
    tokenizer: Any = base.load_tokenizer(model)
    prompts = [opening.format(topic) for opening in OPENINGS for topic in TOPICS][: args.prompts]
    weights = tuple(range(args.particles, 0, -1))
    config = configured(args.base, args.particles, "cpu", "float32", sequences=64)
    failures = 0
    async with running_engine(args.base, args.particles, config) as (engine, adapters):
        reference = Reference(model, [adapter.path for adapter in adapters])

        async def write(prompt: str, mixing: Mixing) -> tuple[list[int], Trace]:
            trace = Trace(tuple(adapters), tuple(map(float, weights)), mixing)
            body = {"model": "p0", "prompt": prompt, "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True}
            answer: Any = await engine.complete({**body, "return_token_ids": True}, None, trace)
            return answer["choices"][0]["token_ids"], trace

        for mixing in ("sequence", "token"):
            texts = await asyncio.gather(*(write(prompt, mixing) for prompt in prompts))
            found = [
                compare(reference, tokenizer.encode(prompt), text, trace)
                for prompt, (text, trace) in zip(prompts, tqdm(texts, mixing, disable=None), strict=True)
            ]
            failures += report(mixing, found, adapters, args.tokens)
    return failures


def compare(reference: Reference, prompt: list[int], text: list[int], trace: Trace) -> tuple[int, float, float, float]:
    """(tokens the reference would not have chosen, largest differences of probabilities and of weights, smallest
    number of effective particles)."""
    log_p = reference.log_p(prompt, text)
    laws, weights = mixture(log_p, text, trace.weights, trace.mixing)
    ours = predictive_of(trace, trace.text(0).rows)
    chosen = torch.tensor(text)
    expected = laws[: len(text)].gather(1, chosen[:, None])[:, 0].exp()
    other = int((laws[: len(text)].argmax(1) != chosen).sum())
    probability = float((ours.logprob.exp() - expected).abs().max())
    weight = float((ours.log_weights.exp() - weights[: len(ours.log_weights)]).abs().max())
    return other, probability, weight, float(ours.effective_particles.min())


def report(
    mixing: Mixing, found: Sequence[tuple[int, float, float, float]], adapters: Sequence[Adapter], tokens: int
) -> int:
    other, probabilities, weights, effective = zip(*found, strict=True)
    failed = sum(other) > 0 or max(*probabilities, *weights) > TARGET
    print(
        f"{mixing}: {len(found)} prompts x {tokens} greedy tokens, K = {len(adapters)}, float32: {sum(other)} tokens "
        f"differ; largest difference of a probability {max(probabilities):.1e}, of a weight {max(weights):.1e} "
        f"(target <= {TARGET:.0e}: {'MISSED' if failed else 'met'}); effective particles down to {min(effective):.2f}",
        flush=True,
    )
    return int(failed)


if __name__ == "__main__":
    main()
