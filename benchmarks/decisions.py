"""Questions per second of `/v1/decisions`: what a question costs by each predictive, and what it costs elsewhere.

    python -m benchmarks.decisions                              all parts
    python -m benchmarks.decisions --parts sharing orders       some of them

rates: the same rows by `map`, `mixture`, particles "auto" and `linearized`; beside the mixture's particles asked for in
a request each (posteriors of one adapter, in the same engine); and beside vLLM's own server, with the MAP's adapter and
the arguments that ours gives its engine, asked for the same reads of the same candidates by `/v1/completions` with
`logprob_token_ids`: a request for each read, as token ids, all of an input at once. Its `/v1/systemone` knows a few
architectures (READ_STRATEGIES) and answers 501 for a Llama such as SmolLM2, and its `/generative_scoring` tells the
probability of the first label alone.

sharing: the questions of one long input in one request, in a request each, and in a request each with an input of its
own, of which nothing can be shared; and the tokens that the engine's prefix cache answered.

orders: how far one order of the options is from the average of several, on real rows, by the mixture.

Nothing is asked twice: each input begins with a number that no other has, so that no block of a prompt is in a prefix
cache before its own request. The ways take turns on the same rows, and each repeat begins with another one. Both
servers run all the time; the one that is not asked waits, vLLM's own after a second of spinning, which is not timed.
Numbers are the median of the repeats with the least and the most; ratios are paired by repeat.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.asking import (
    MORE,
    Asked,
    Rows,
    Way,
    cache,
    own_way,
    scored,
    seconds,
    send,
    shareable,
    single_adapters,
    single_way,
    stock_way,
)
from benchmarks.engines import wait_passively
from benchmarks.predictive import ours, stock
from posterior.data.task import Tokenizer
from posterior.evaluation.report import markdown_rows
from posterior.models import base
from posterior.storage import artefact
from posterior.storage.artefact import Posterior
from server.configuration.schema import SHIPPED
from server.engine.config import set_environment

DATA = Path(__file__).parent / "data" / "support.test.jsonl"
PARTS = ("rates", "sharing", "orders")
OWN: dict[str, dict[str, Any]] = {
    "map": {"predictive": "map"},
    "mixture": {"predictive": "mixture"},
    "auto": {"predictive": "mixture", "particles": "auto"},
    "linearized": {"predictive": "linearized"},
}
STOCK, SINGLE = "stock vLLM", "a request a particle"
WAYS = ("map", STOCK, "mixture", SINGLE, "auto", "linearized")
RATIOS = {("map", STOCK): 0.95, ("mixture", SINGLE): 0.95, ("auto", "mixture"): None, ("linearized", "mixture"): None}
TOGETHER, SAME, APART = "in one request", "in a request each", "in a request each, of an input each"
SHARED_TARGET = 2.5
SPINS = 1.5  # seconds that vLLM's worker waits for more by spinning, and a bit; this server has none on a CPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posterior", type=Path, default=SHIPPED / "support", help="a Laplace posterior of decisions")
    parser.add_argument("--base", help="its base model, as for `posterior serve`")
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL of its rows")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of the rates")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16], help="inputs at once")
    parser.add_argument("--questions", type=int, nargs="+", choices=range(1, 5), default=[1, 4], help="an input")
    parser.add_argument("--inputs", type=int, default=2, help="in a repeat, at least; as many as at once, if more")
    parser.add_argument("--long-inputs", type=int, default=1, help="of the part sharing, in a repeat")
    parser.add_argument("--tokens", type=int, default=300, help="of a long input, at least")
    parser.add_argument("--order-rows", type=int, default=16)
    parser.add_argument("--orders", type=int, default=4)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wait_passively("benchmarks.decisions")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_environment(device)
    model, posterior = base.resolve(args.base), artefact.load(args.posterior)
    tokenizer = base.load_tokenizer(model)
    with tempfile.TemporaryDirectory() as scratch:
        served = single_adapters(posterior, args.particles, Path(scratch) / "served")
        with (
            ours(model, served, args, Path(scratch) / "cache") as own,
            stock(model, served, [served.map_dir], args, device) as theirs,
        ):
            ways = {name: own_way(own, served.name, options) for name, options in OWN.items()}
            ways[SINGLE] = single_way(own, args.particles)
            ways[STOCK] = stock_way(theirs, served, tokenizer)
            machine = f"{args.dtype} on {device} ({os.cpu_count()} cores)"
            print(f"{machine}, K = {args.particles}, seed {args.seed}, n = {args.repeats} repeats", flush=True)
            rows = Rows(args.data, args.seed)
            asyncio.run(measure(args, own, ways, rows, served, tokenizer))


async def measure(
    args: argparse.Namespace,
    own: str,
    ways: Mapping[str, Way],
    rows: Rows,
    posterior: Posterior,
    tokenizer: Tokenizer,
) -> None:
    """Print each part when it has been measured."""
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=1024)) as client:
        for way in ways.values():  # warms up
            await seconds(client, [way(rows.asked(rows.take(1)[0], len(MORE)))], 1)
        await asyncio.sleep(SPINS)
        if "rates" in args.parts:
            chosen = {name: ways[name] for name in WAYS if name in args.ways}
            print(rates_table(await rates(args, client, chosen, rows), list(chosen)), flush=True)
        if "sharing" in args.parts:
            table = []
            for name, particles in (("map", 1), ("mixture", args.particles)):
                found = await sharing(args, client, own, ways[name], rows, posterior, tokenizer)
                table += sharing_rows(name, particles, found)
            print(f"\nInputs of at least {args.tokens} tokens\n\n{markdown_rows([SHARING_HEAD, *table])}", flush=True)
        if "orders" in args.parts:
            print(orders_table(await orders(args, client, ways["mixture"], rows), args.orders), flush=True)


# Questions per second

Cell = tuple[int, int]  # questions an input, inputs at once


async def rates(
    args: argparse.Namespace, client: httpx.AsyncClient, ways: Mapping[str, Way], rows: Rows
) -> dict[Cell, dict[str, list[float]]]:
    """Questions per second of each way in each repeat."""
    cells = [(questions, at_once) for questions in args.questions for at_once in args.concurrency]
    found: dict[Cell, dict[str, list[float]]] = {cell: {name: [] for name in ways} for cell in cells}
    for repeat in range(args.repeats):
        for questions, at_once in cells:
            taken = rows.take(max(args.inputs, at_once))
            for name in turned(list(ways), repeat):
                posts = [ways[name](rows.asked(row, questions)) for row in taken]
                rate = questions * len(taken) / await seconds(client, posts, at_once)
                found[questions, at_once][name].append(rate)
                if name == STOCK:
                    await asyncio.sleep(SPINS)
                progress(f"repeat {repeat + 1}: {questions} questions, {at_once} at once, {name}: {rate:.2f}/s")
    return found


def rates_table(found: Mapping[Cell, Mapping[str, Sequence[float]]], ways: Sequence[str]) -> str:
    """Two Markdown tables: questions per second, and ratios with their targets."""
    pairs = {pair: target for pair, target in RATIOS.items() if set(pair) <= set(ways)}
    names = {pair: f"{' / '.join(pair)}{f', target ≥ {target}' if target else ''}" for pair, target in pairs.items()}
    head = ["questions an input", "inputs at once"]
    rates, ratios = [[*head, *ways]], [[*head, *names.values()]]
    for (questions, at_once), rate in found.items():
        place = [str(questions), str(at_once)]
        rates.append([*place, *(spread(rate[name]) for name in ways)])
        ratios.append([*place, *(verdict(rate[a], rate[b], target) for (a, b), target in pairs.items())])
    return "\n\n".join(["\nQuestions per second", markdown_rows(rates), *([markdown_rows(ratios)] if pairs else [])])


# One input and its questions


@dataclass
class Shared:
    """One way to ask the questions of long inputs, in all repeats. queried, hits: tokens of all particles that
    the prefix cache was asked for, and that it had. possible: of one particle, that it had if it kept all it saw."""

    rate: list[float] = field(default_factory=list)
    queried: float = 0.0
    hits: float = 0.0
    possible: float = 0.0


async def sharing(
    args: argparse.Namespace,
    client: httpx.AsyncClient,
    url: str,
    way: Way,
    rows: Rows,
    posterior: Posterior,
    tokenizer: Tokenizer,
) -> dict[str, Shared]:
    """By TOGETHER, SAME and APART."""
    found = {how: Shared() for how in (TOGETHER, SAME, APART)}
    await seconds(client, [way(rows.long(tokenizer, args.tokens)())], 1)  # warms up
    for repeat in range(args.repeats):
        makes = [rows.long(tokenizer, args.tokens) for _ in range(args.long_inputs)]
        for how in turned(list(found), repeat):
            each, inputs = found[how], [divided(how, make) for make in makes]
            posts = [[post for asked in parts for post in way(asked)] for parts in inputs]
            before = await cache(client, url)
            each.rate.append(len(MORE) * len(inputs) / await seconds(client, posts, 1))
            await asyncio.sleep(0.5)  # the counters follow the answers
            after = await cache(client, url)
            each.queried += after.queried - before.queried
            each.hits += after.hits - before.hits
            prompts = [
                tokens for parts in inputs for asked in parts for tokens, _ in scored(posterior, tokenizer, asked)
            ]
            each.possible += shareable(prompts)
            progress(f"sharing, repeat {repeat + 1}: {how}: {each.rate[-1]:.2f}/s")
    return found


def divided(how: str, make: Callable[[], Asked]) -> list[Asked]:
    """The questions of an input together, or one by one, of the same input or of one each."""
    whole = make()
    if how == TOGETHER:
        return [whole]
    inputs = [whole.input if how == SAME else make().input for _ in whole.questions]
    return [Asked(input, (question,)) for input, question in zip(inputs, whole.questions, strict=True)]


SHARING_HEAD = [
    "predictive", "4 questions", "questions/s", f"together / it (the last: target ≥ {SHARED_TARGET})",
    "tokens asked for", "of them cached", "of what could be cached",
]  # fmt: skip


def sharing_rows(name: str, particles: int, found: Mapping[str, Shared]) -> list[list[str]]:
    """Of the table with SHARING_HEAD."""
    table = []
    for how, each in found.items():
        ratio = verdict(found[TOGETHER].rate, each.rate, SHARED_TARGET if how == APART else None)
        possible = f"{each.hits / (particles * each.possible):.3f}" if each.possible else "nothing could"
        share = f"{each.hits / each.queried:.3f}" if each.queried else "none"
        table.append([name, how, spread(each.rate), ratio, f"{each.queried:.0f}", share, possible])
    return table


# The order of the options


async def orders(args: argparse.Namespace, client: httpx.AsyncClient, way: Way, rows: Rows) -> dict[str, list[float]]:
    """By the type of the rows' own question, the total variation of the order that is farthest from the average."""
    found: dict[str, list[float]] = defaultdict(list)
    for number, row in enumerate(rows.take(args.order_rows), 1):
        (post,) = way(rows.asked(row, 1))
        post.body["uncertainty"]["orders"] = args.orders
        (reply,) = await send(client, [post])
        variation = reply["answers"][0]["uncertainty"]["orders"]["total_variation"]
        found[row["question"]["type"]].append(variation)
        progress(f"orders, row {number} of {args.order_rows}: {variation:.3f}")
    return found


def orders_table(found: Mapping[str, Sequence[float]], most: int) -> str:
    """A Markdown table."""
    table = [["question", "rows", "total variation of an order from the average: mean", "median", "largest"]]
    for kind, values in found.items():
        numbers = (statistics.fmean(values), statistics.median(values), max(values))
        table.append([kind, str(len(values)), *(f"{each:.3f}" for each in numbers)])
    return f"\nAveraged over up to {most} orders\n\n{markdown_rows(table)}"


# How it is written


def turned(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def verdict(ours: Sequence[float], others: Sequence[float], target: float | None) -> str:
    """Ratios paired by repeat, and whether their median meets the target."""
    ratios = [a / b for a, b in zip(ours, others, strict=True)]
    if target is None:
        return spread(ratios)
    return f"{spread(ratios)} {'met' if statistics.median(ratios) >= target else 'MISSED'}"


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
