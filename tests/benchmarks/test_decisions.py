"""What benchmarks/decisions.py asks of its servers, and what it makes of the numbers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import asking, decisions
from benchmarks.asking import MORE, Asked, Post, Rows, own_way, read_cache, seconds, shareable, single_way, stock_way
from benchmarks.decisions import APART, SAME, TOGETHER, Shared
from posterior.data.task import Tokenizer
from posterior.models.base import load_tokenizer, resolve
from posterior.storage import artefact
from posterior.storage.artefact import Posterior
from server.configuration.schema import SHIPPED

URL = "http://server"


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    question = {"type": "choice", "instructions": "Which?", "choices": [{"value": "cards"}, {"value": "top-ups"}]}
    path = tmp_path / "rows.jsonl"
    texts = [json.dumps({"input": f"my card number {n}", "question": question, "answer": "cards"}) for n in range(4)]
    path.write_text("\n".join(texts))
    return Rows(path, 0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve())


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return artefact.load(SHIPPED / "support")


def test_no_input_is_asked_twice(rows: Rows, tokenizer: Tokenizer) -> None:
    (row,) = rows.take(1)
    first, second = (rows.asked(row, 4) for _ in range(2))
    assert first.input != second.input
    assert asking.length(tokenizer, first.input) == asking.length(tokenizer, second.input)
    assert first.questions == (row["question"], *MORE[:3])
    blocks = [tuple(tokenizer.encode(asking.transcript(each.input)))[: asking.BLOCK] for each in (first, second)]
    assert blocks[0] != blocks[1]


def test_long_inputs(rows: Rows, tokenizer: Tokenizer) -> None:
    make = rows.long(tokenizer, 300)
    one, other = make(), make()
    assert 300 <= asking.length(tokenizer, one.input) == asking.length(tokenizer, other.input) < 330
    assert one.input[0] != other.input[0]
    assert one.input[1:] == other.input[1:]


def test_stock_is_asked_for_what_the_server_reads(rows: Rows, tokenizer: Tokenizer, posterior: Posterior) -> None:
    """The prompt and the first tokens of both candidates, then the rest of the one that has several."""
    asked = rows.asked(rows.take(1)[0], 1)
    posts = stock_way(URL, posterior, tokenizer)(asked)
    text = f"{asked.input}\n\nWhich?\n- cards\n- top-ups\nAnswer:"
    prompt, several = tokenizer.encode(text), tokenizer.encode(" top-ups")
    assert [post.body["prompt"] for post in posts] == [[*prompt, *several[:n]] for n in range(len(several))]
    starts = [*tokenizer.encode(" cards"), several[0]]
    assert [post.body["logprob_token_ids"] for post in posts] == [starts, *([token] for token in several[1:])]


def test_ways_of_this_server() -> None:
    asked = Asked("so", MORE)
    (post,) = own_way(URL, "support", {"predictive": "mixture"})(asked)
    body = {"input": "so", "questions": list(MORE)}
    assert post == Post(f"{URL}/v1/decisions", {"model": "support", **body, "uncertainty": {"predictive": "mixture"}})
    posts = single_way(URL, 3)(asked)
    assert [each.body["model"] for each in posts] == ["particle-0", "particle-1", "particle-2"]
    assert all(each.body == {**each.body, **body, "uncertainty": {"predictive": "map"}} for each in posts)


def test_each_particle_becomes_a_posterior(posterior: Posterior, tmp_path: Path) -> None:
    whole = asking.single_adapters(posterior, 2, tmp_path / "served")
    assert whole.hash == posterior.hash
    singles = [artefact.load(tmp_path / "served" / f"particle-{k}") for k in range(2)]
    for single, theta in zip(singles, posterior.thetas(2), strict=True):
        (kept,) = single.thetas(1)
        assert all(kept[name].equal(value) for name, value in theta.items())
        assert single.task == posterior.task


def test_as_many_inputs_at_once_as_asked() -> None:
    running, most, sent = 0, 0, []

    async def reply(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        sent.append(json.loads(request.content)["n"])
        return httpx.Response(200, json={})

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(reply)) as client:
            await seconds(client, [[Post(URL, {"n": n}) for _ in range(2)] for n in range(5)], 3)

    asyncio.run(run())
    assert most == 6  # two requests an input
    assert sorted(sent) == [n for n in range(5) for _ in range(2)]


def test_questions_together_and_apart() -> None:
    numbers = iter(range(100))

    def make() -> Asked:
        return Asked(next(numbers), MORE)

    assert decisions.divided(TOGETHER, make) == [Asked(0, MORE)]
    same, apart = decisions.divided(SAME, make), decisions.divided(APART, make)
    assert [each.input for each in same] == [1] * 4
    assert len({each.input for each in apart}) == 4
    assert [each.questions for each in same] == [each.questions for each in apart] == [(one,) for one in MORE]


def test_what_a_prefix_cache_could_have() -> None:
    start = list(range(9))
    assert shareable([[*start, 20], [*start, 21], [*start, 21]], block=4) == 16
    assert shareable([start[:8], start[:8]], block=4) == 4  # the last token is always read
    assert shareable([[1, *start], [2, *start]], block=4) == 0


def test_the_caches_counters() -> None:
    text = (
        "# TYPE vllm:prefix_cache_queries_total counter\n"
        'vllm:prefix_cache_queries_total{engine="0",model_name="b"} 100.0\n'
        'vllm:prefix_cache_queries_created{engine="0",model_name="b"} 1.7e+09\n'
        'vllm:prefix_cache_hits_total{engine="0",model_name="b"} 2.5e+01\n'
        'vllm:external_prefix_cache_hits_total{engine="0",model_name="b"} 7.0\n'
    )
    assert read_cache(text) == (100, 25)


def test_tables() -> None:
    found: dict[tuple[int, int], dict[str, Any]] = {(4, 8): {"map": [1.0, 2.0, 3.0], "stock vLLM": [1.0, 1.0, 4.0]}}
    lines = decisions.rates_table(found, ["map", "stock vLLM"]).splitlines()
    assert "| 4 | 8 | 2.00 [1.00, 3.00] | 1.00 [1.00, 4.00] |" in lines
    assert lines[-1] == "| 4 | 8 | 1.00 [0.75, 2.00] met |"
    found[4, 8]["stock vLLM"] = [2.0, 2.0, 4.0]
    assert decisions.rates_table(found, ["map", "stock vLLM"]).endswith("| 0.75 [0.50, 1.00] MISSED |")
    assert "/" not in decisions.rates_table({(1, 1): {"auto": [1.0]}}, ["auto"])
    rates = {TOGETHER: Shared([5.0], 100, 60, 30), SAME: Shared([4.0], 100, 30, 30), APART: Shared([1.0], 100, 0, 0)}
    assert [row[3:] for row in decisions.sharing_rows("mixture", 2, rates)] == [
        ["1.00 [1.00, 1.00]", "100", "0.600", "1.000"],
        ["1.25 [1.25, 1.25]", "100", "0.300", "0.500"],
        ["5.00 [5.00, 5.00] met", "100", "0.000", "nothing could"],
    ]
    assert decisions.orders_table({"choice": [0.1, 0.3]}, 4).endswith("| choice | 2 | 0.200 | 0.200 | 0.300 |")
