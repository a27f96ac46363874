"""Requests and tokens a minute, against a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.access.quotas import MINUTE, Allowance, Quota, Wait


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    limit=st.integers(1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 50), st.integers(0, 3000)), min_size=1, max_size=40),
)
def test_the_mean_is_the_limit_whatever_is_asked(limit: int, steps: list[tuple[float, int]]) -> None:
    """Each step waits and, if anything is left, spends. What was spent before the last step is at most a minute's worth
    and what has filled up meanwhile; and a request is refused exactly while more than that was used."""
    clock = Clock()
    allowance, spent, level = Allowance(limit, clock=clock), 0, float(limit)
    for seconds, amount in steps:
        clock.now += seconds
        level = min(level + seconds * limit / MINUTE, limit)
        wait = allowance.seconds_until(1)
        assert allowance.left == pytest.approx(level, abs=1e-6)
        assert wait == pytest.approx(max(1 - level, 0) * MINUTE / limit, abs=1e-6)
        if wait == 0:
            assert spent <= limit + clock.now * limit / MINUTE + 1e-6
            allowance.spend(amount)
            spent, level = spent + amount, level - amount


def test_what_is_owed_is_waited_for() -> None:
    clock = Clock()
    allowance = Allowance(60, clock=clock)
    allowance.spend(90)
    assert allowance.left == -30 and allowance.seconds_until(1) == 31
    clock.now = 31.0
    assert allowance.seconds_until(1) == 0
    clock.now = 10_000.0
    assert allowance.left == 60, "nothing is saved up"


def test_a_quota_counts_requests_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    quota = Quota()
    quota.limit(requests=2, tokens=100)
    assert quota.headers()["x-ratelimit-remaining-requests"] == "2"
    assert quota.enter() is None and quota.enter() is None
    wait = quota.enter()
    assert wait == Wait("requests", 2, 30)
    quota.limit(requests=None, tokens=100)
    quota.spend("tokens", 200)
    assert quota.enter() == Wait("tokens", 100, 61)
    headers = quota.headers()
    assert headers == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "120s",
    }


def test_the_longer_wait_is_told() -> None:
    quota = Quota()
    quota.limit(requests=60, tokens=60)
    for _ in range(60):
        assert quota.enter() is None
    quota.spend("tokens", 100)
    wait = quota.enter()
    assert wait is not None and wait.what == "tokens" and wait.seconds in (40, 41)


def test_a_new_limit_forgives_nothing() -> None:
    quota = Quota()
    quota.limit(tokens=10)
    quota.spend("tokens", 30)
    quota.limit(tokens=60)
    wait = quota.enter()
    assert wait is not None and wait.seconds in (20, 21)
    quota.limit(tokens=5)
    assert quota.headers()["x-ratelimit-limit-tokens"] == "5"


def test_no_limit_is_no_limit() -> None:
    quota = Quota()
    quota.limit(requests=None, tokens=None)
    quota.spend("tokens", 10**15)
    assert quota.enter() is None and quota.headers() == {}
