"""Rate estimates and credit windows, under a virtual clock."""

from __future__ import annotations

import pytest
from dualpath.transfer.credit import CreditConfig
from dualpath.transfer.rates import RateEstimate
from hypothesis import given
from hypothesis import strategies as st

CHUNK = 256 << 10


def carry(estimate: RateEstimate, rate: float, start: float, seconds: float) -> float:
    """Chunks land back to back at `rate`; returns the time of the last."""
    now = start
    while now < start + seconds:
        now += CHUNK / rate
        estimate.landed(CHUNK, now)
    return now


@given(st.floats(5e6, 1e10), st.floats(5e6, 1e10))
def test_an_estimate_follows_a_change_within_a_second_of_work(before: float, after: float) -> None:
    estimate = RateEstimate()
    estimate.begin(0.0)
    now = carry(estimate, before, 0.0, 1.0) if max(before, after) < 1e9 else 0.0
    if now:
        assert estimate.bytes_per_s(now) == pytest.approx(before, rel=0.05)
        now = carry(estimate, after, now, 1.0)
    else:
        now = carry(estimate, after, 0.0, 0.1)
    tolerance = 0.05 + 0.03 * before / after  # what is left of the old rate after four memories
    assert estimate.bytes_per_s(now) == pytest.approx(after, rel=tolerance)


@given(st.lists(st.floats(0.0, 100.0), max_size=5))
def test_idle_time_neither_lowers_nor_ages_an_estimate(pauses: list[float]) -> None:
    estimate = RateEstimate()
    now = 0.0
    for pause in [0.0, *pauses]:
        now += pause
        estimate.begin(now)
        now = carry(estimate, 50e6, now, 0.1)
        estimate.end()
        assert estimate.bytes_per_s(now) == pytest.approx(50e6, rel=0.02)
    assert estimate.bytes_per_s(now + 1000) == pytest.approx(50e6, rel=0.02)


def test_an_estimate_is_unknown_until_enough_was_seen() -> None:
    estimate = RateEstimate()
    assert estimate.bytes_per_s(0.0) == 0
    estimate.begin(0.0)
    estimate.landed(CHUNK, 0.001)
    assert estimate.bytes_per_s(0.001) == 0
    estimate.landed(CHUNK, 0.006)
    assert estimate.bytes_per_s(0.006) > 0


def test_an_estimate_sinks_while_the_next_arrival_is_overdue() -> None:
    estimate = RateEstimate()
    estimate.begin(0.0)
    now = carry(estimate, 50e6, 0.0, 1.0)
    assert estimate.bytes_per_s(now + CHUNK / 50e6) == pytest.approx(50e6, rel=0.02)
    seen = [estimate.bytes_per_s(now + later) for later in (0.01, 0.1, 0.5, 1.0, 5.0)]
    assert seen == sorted(seen, reverse=True)
    assert seen[3] < 0.05 * 50e6


def test_what_lands_while_nothing_was_due_is_not_counted() -> None:
    estimate = RateEstimate()
    estimate.landed(CHUNK, 1.0)
    assert not estimate.busy
    assert estimate.bytes_per_s(2.0) == 0


@given(st.floats(0, 1e13), st.integers(0, 1 << 30), st.integers(1, 1 << 24))
def test_credit_keeps_its_bounds_and_always_lets_two_chunks_through(
    rate: float, inflight: int, nbytes: int
) -> None:
    credit = CreditConfig()
    window = credit.window_bytes(rate)
    assert credit.window_bytes_min <= window <= credit.window_bytes_max
    assert 0 < credit.batch_bytes(window) <= window
    assert credit.allows(window, 0, nbytes)
    assert credit.allows(window, nbytes, nbytes)
    assert window <= credit.window_bytes(rate, alone=True) <= credit.window_bytes_max
    if credit.allows(window, inflight, nbytes):
        assert inflight + nbytes <= max(window, 2 * nbytes)


def test_the_window_of_a_fast_path_is_forty_milliseconds_of_its_rate() -> None:
    credit = CreditConfig()
    assert credit.window_bytes(0) == 2 << 20
    assert credit.window_bytes(0, alone=True) == 64 << 20
    assert credit.window_bytes(100e6, alone=True) == 4_000_000
    assert credit.window_bytes(100e6) == 4_000_000
    assert credit.window_bytes(1e3) == 512 << 10
    assert credit.window_bytes(1e12) == 128 << 20
