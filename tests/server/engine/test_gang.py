"""Gangs under pressure: the real scheduler and mixer, a hash for a model, random loads. `make soak` runs more seeds."""

from __future__ import annotations

import math
import os
import random
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posterior.models import base as base_models
from posterior.predictive.decoding import Mixing
from server.engine import Adapter
from server.engine.compat.blocks import Group
from server.engine.distributions import mix
from server.engine.gang import MAX_SCORED, Trace
from server.errors import Refused
from tests.server.gangs import (  # with what is vLLM's: its environment is prepared there
    VOCABULARY,
    Engine,
    MixingLLM,
    RequestStatus,
    Runner,
    SamplingParams,
    alone,
    logits_of,
    make_scheduler,
    token_seed,
)

SEEDS = int(os.environ.get("SEEDS", "25"))
ADAPTERS = tuple(Adapter(f"p{k}", Path(f"/nowhere/p{k}"), k + 1) for k in range(8))


@pytest.fixture(scope="module")
def model() -> Path:
    return base_models.resolve().path


def gang(k: int, mixing: Mixing = "sequence", first: int = 0) -> Trace:
    return Trace(ADAPTERS[first : first + k], tuple(float(1 + i) for i in range(k)), mixing)


def expected(trace: Trace | None, prompt: list[int], tokens: int) -> list[int]:
    if trace is None:
        return alone(["base"], [1.0], "token", prompt, tokens)
    return alone([a.name for a in trace.adapters if a], trace.weights, trace.mixing, prompt, tokens)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_load_gives_every_request_its_own_text(model: Path, seed: int) -> None:
    """Gangs and plain requests of random sizes and lengths, a cache too small for all of one or two groups of layers,
    clients that leave: whoever
    stays gets exactly what brute force gives for the request alone, and nothing is left behind."""
    rng = random.Random(seed)
    second = rng.choice([None, None, (None,), (6,)])
    engine = Engine(
        make_scheduler(
            model,
            blocks=rng.choice([40, 60, 90]) * (1 if second is None else 2),
            sequences=rng.choice([8, 12, 24]),
            batched_tokens=rng.choice([24, 40, 128]),
            loras=8,
            second=second,
        )
    )
    wanted: dict[str, tuple[Trace | None, list[int], int]] = {}
    for number in range(rng.randint(4, 14)):
        k = rng.choice([0, 1, 2, 3, 4])  # 4 x (12 + 12) tokens need 24 of at least 39 blocks
        trace = gang(k, rng.choice(["sequence", "token"]), rng.randint(0, 4)) if k else None
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 12))]
        wanted[f"r{number}"] = (trace, prompt, rng.randint(1, 12))
    arrivals = list(wanted)
    while arrivals:
        for _ in range(rng.randint(1, 4)):
            if arrivals:
                name = arrivals.pop(0)
                trace, prompt, tokens = wanted[name]
                engine.add(name, prompt, tokens, trace)
        for _ in range(rng.randint(0, 5)):
            engine.step()
        for name, written in engine.written.items():
            if not written.finished and rng.random() < 0.05:
                engine.abort(name)
                del wanted[name]
    engine.run()
    for name, (trace, prompt, tokens) in wanted.items():
        written = engine.written[name]
        assert written.tokens == expected(trace, prompt, tokens), name
        assert written.notes == (tokens if trace is not None else 0) and written.resumed == 0
    engine.assert_nothing_left()


def test_pressure_really_preempts(model: Path) -> None:
    engine = Engine(make_scheduler(model, blocks=33, sequences=24, batched_tokens=64, loras=8))
    preempted: list[str] = []
    original = engine.scheduler._preempt_request

    def count(request: Any, *args: Any, **kwargs: Any) -> None:
        preempted.append(request.request_id)
        original(request, *args, **kwargs)

    engine.scheduler._preempt_request = count  # type: ignore[method-assign]
    for number in range(4):
        engine.add(f"r{number}", [number] * 6, 20, gang(4))
    engine.run()
    assert preempted
    for number in range(4):
        assert engine.written[f"r{number}"].tokens == expected(gang(4), [number] * 6, 20)
    engine.assert_nothing_left()


def test_siblings_that_disagree_begin_again_from_the_clients_text(model: Path) -> None:
    flips = {3, 9}
    seen: list[str] = []

    def fault(request_id: str, token: int) -> int:
        if request_id.startswith("posterior_sibling:r0:1"):
            seen.append(request_id)
            if len(seen) in flips:
                return (token + 1) % VOCABULARY
        return token

    engine = Engine(make_scheduler(model, blocks=60, sequences=8, batched_tokens=64, loras=8), Runner(fault))
    check, engine._check = engine._check, lambda: None  # type: ignore[method-assign]
    engine.add("r0", [1, 2, 3], 16, gang(3))
    engine.add("r1", [4, 5], 16, gang(2))
    engine.run()
    check()
    assert engine.written["r0"].tokens == expected(gang(3), [1, 2, 3], 16), "never silently wrong"
    assert engine.written["r0"].resumed == 2 and engine.written["r1"].resumed == 0
    assert len(set(seen)) == 3, "two generations of replacements"
    engine.assert_nothing_left()


def test_neither_gangs_nor_plain_requests_starve(model: Path) -> None:
    """The stated bound: a request gets its first token after at most the remaining tokens of what runs when it
    arrives plus those of what waits before it, whatever comes later; plus one step for each to be admitted."""
    for gang_first in (True, False):
        engine = Engine(make_scheduler(model, blocks=60, sequences=5, batched_tokens=64, loras=8))
        for number in range(5):
            engine.add(f"early{number}", [number] * 3, 10)
        engine.step()
        engine.add("target", [7, 8], 10, gang(4) if gang_first else None)
        arrival = engine.steps
        for step in range(200):
            later = gang(4) if not gang_first else None
            engine.add(f"late{step}", [step % VOCABULARY] * 3, 10, later)
            engine.step()
            if engine.written["target"].admitted is not None:
                break
        assert engine.written["target"].admitted is not None
        assert engine.written["target"].admitted - arrival <= 10 + 1


def cache(blocks: int, sequences: int, *more: Group) -> Any:
    """What `_fit` reads of an engine: blocks of 16 tokens, of which vLLM keeps one."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=blocks + 1),
        scheduler_config=SimpleNamespace(max_num_seqs=sequences),
        model_config=SimpleNamespace(max_model_len=2**17),
    )
    return SimpleNamespace(vllm_config=config, groups=[(16, None), *more])


def test_a_gang_that_can_never_fit_is_refused_with_the_numbers() -> None:
    explicit = replace(gang(4), explicit=True)
    with pytest.raises(Refused, match=r"4 particles x \(20 prompt \+ 30 new.* need 16 blocks; .*has 15"):
        MixingLLM._fit(cache(15, 8), explicit, 20, SamplingParams(max_tokens=30))
    with pytest.raises(Refused, match="4 particles need 4 sequences in one batch; this server has 3"):
        MixingLLM._fit(cache(100, 3), explicit, 20, SamplingParams(max_tokens=30))
    with pytest.raises(Refused, match="need"):
        MixingLLM._fit(cache(4, 8), gang(4), 20, SamplingParams(max_tokens=30))
    params = SamplingParams(max_tokens=30)
    MixingLLM._fit(cache(16, 8), explicit, 20, params)
    assert params.max_tokens == 30, "what just fits is served"
    MixingLLM._fit(cache(15, 8), gang(4), 20, params)
    assert params.max_tokens == 3 * 16 - 20, "a length that the client left to us is cut to what fits"


def test_every_group_of_the_cache_counts() -> None:
    """A second group of all tokens doubles what a text takes; one of a sliding window adds its bound."""
    explicit = replace(gang(4), explicit=True)
    with pytest.raises(Refused, match="need 32 blocks; .*has 31"):
        MixingLLM._fit(cache(31, 8, (16, None)), explicit, 20, SamplingParams(max_tokens=30))
    with pytest.raises(Refused, match="need 24 blocks; .*has 23"):
        MixingLLM._fit(cache(23, 8, (16, 2)), explicit, 20, SamplingParams(max_tokens=30))
    MixingLLM._fit(cache(24, 8, (16, 2)), explicit, 20, SamplingParams(max_tokens=30))
    params = SamplingParams(max_tokens=1000)
    MixingLLM._fit(cache(24, 8, (16, 2)), gang(4), 20, params)
    assert params.max_tokens == 4 * 16 - 20


def test_an_echo_keeps_a_bounded_number_of_hidden_states() -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    MixingLLM._fit(cache(2**16, 8), gang(4), MAX_SCORED // 4, params)
    with pytest.raises(Refused, match=f"4 particles x {MAX_SCORED // 4 + 1} tokens of an echoed prompt are"):
        MixingLLM._fit(cache(2**16, 8), gang(4), MAX_SCORED // 4 + 1, params)


@pytest.mark.parametrize(("window", "most"), [(None, 12 * 4 - 5), (6, (24 - 9) * 4 - 5)])
def test_gangs_share_a_cache_of_two_groups(model: Path, window: int | None, most: int) -> None:
    """Of all tokens, and of all tokens or a sliding window: the longest gang that is let in is written in full, and
    those behind it are not kept waiting for ever. The scheduler counts as the door does."""
    scheduler = make_scheduler(model, blocks=97, sequences=12, batched_tokens=24, loras=8, second=(window,))
    assert len(scheduler.kv_cache_config.kv_cache_groups) == 2
    engine = Engine(scheduler)
    front = cache(96, 12)
    front.groups = scheduler._groups
    front.vllm_config.model_config.max_model_len = 64
    params = SamplingParams(max_tokens=64)
    MixingLLM._fit(front, gang(4), 5, params)
    assert params.max_tokens == most, "a window of 6 tokens, and 24 on their way, hold at most 9 blocks of 4"
    wanted = {"long": (gang(4), [1, 2, 3, 4, 5], most), "plain": (None, [7], 9), "other": (gang(2), [8], 9)}
    for name, (trace, prompt, tokens) in wanted.items():
        engine.add(name, prompt, tokens, trace)
    engine.run()
    for name, (trace, prompt, tokens) in wanted.items():
        assert engine.written[name].tokens == expected(trace, prompt, tokens), name
    engine.assert_nothing_left()


class Grammar:
    """Takes any token."""

    def accept_tokens(self, *_: Any) -> bool:
        return True

    def is_terminated(self) -> bool:
        return False


def with_a_held_grammar(model: Path) -> tuple[Engine, Future[Any]]:
    """A gang whose grammar is being compiled, and what came behind it, after a few steps."""
    engine = Engine(make_scheduler(model, blocks=90, sequences=8, batched_tokens=64, loras=8))
    engine.add("held", [1, 2, 3], 8, gang(3), structured=True)
    grammar: Future[Any] = Future()
    engine.scheduler.requests["held"].structured_output_request.grammar = grammar
    engine.add("plain", [4, 5], 4)
    engine.add("behind", [6], 4, gang(2))
    for _ in range(12):
        engine.step()
    return engine, grammar


def test_a_gang_waits_for_its_grammar_and_nobody_else_does(model: Path) -> None:
    engine, grammar = with_a_held_grammar(model)
    held = engine.scheduler.gangs["held"]
    assert not any(member.status == RequestStatus.RUNNING for member in held), "siblings wait with their leader"
    assert engine.written["plain"].finished and engine.written["behind"].finished
    grammar.set_result(Grammar())
    engine.run()
    assert engine.written["held"].tokens == expected(gang(3), [1, 2, 3], 8)
    assert engine.written["behind"].tokens == expected(gang(2), [6], 4)
    engine.assert_nothing_left()


def test_a_client_that_leaves_while_its_grammar_is_compiled_leaves_nothing(model: Path) -> None:
    engine, _ = with_a_held_grammar(model)
    engine.abort("held")
    engine.run()
    engine.assert_nothing_left()


def test_mixing_is_the_weighted_average_of_probabilities() -> None:
    logits = torch.stack([torch.stack([logits_of(f"p{k}", [g]) for k in range(3)]) for g in range(2)])
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.9, 0.1]], dtype=torch.float64)
    distributions = [logits[g].double().softmax(1) for g in range(2)]
    mixture, log_z, entropies = mix(logits, weights.log())
    for g, p in enumerate(distributions):
        law_ = weights[g] @ p
        assert torch.allclose(mixture[g].double().exp(), law_, atol=1e-7)
        assert torch.allclose((logits[g] - log_z[g][:, None]).double(), p.log(), atol=1e-5)
        assert entropies[g, 0].item() == pytest.approx(float(-(law_ * law_.log()).sum()), abs=1e-5)
        assert entropies[g, 1].item() == pytest.approx(float(weights[g] @ -(p * p.log()).sum(1)), abs=1e-5)


def test_words_that_float32_cannot_hold_keep_their_logarithm() -> None:
    """A grammar may leave nothing but words of probability e^-200."""
    logits = torch.tensor([[[0.0, -200.0, -80.0], [0.0, -300.0, -90.0]]])
    exact = torch.logsumexp(logits[0].double().log_softmax(1) + math.log(0.5), 0)
    mixture, *_ = mix(logits, torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())
    assert mixture[0].tolist() == pytest.approx(exact.tolist(), rel=1e-6, abs=1e-6)


def test_words_that_no_particle_can_say_do_no_harm() -> None:
    logits = torch.tensor([[[0.0, 1.0, -torch.inf], [0.5, 0.0, -torch.inf]]])
    mixture, _, entropies = mix(logits, torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())
    assert mixture[0, 2] == -torch.inf and bool(torch.isfinite(entropies).all())


def test_token_seeds_differ_by_seed_and_position() -> None:
    seeds = {token_seed(seed, position) for seed in range(-50, 50) for position in range(200)}
    assert len(seeds) == 100 * 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) > 19_990, "a CPU generator uses 32 bits of it"
