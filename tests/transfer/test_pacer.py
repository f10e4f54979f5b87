"""A link's limit holds on average, with a bounded burst, and is shared in turn."""

from __future__ import annotations

import threading
import time

import pytest
from dualpath.transfer.errors import InvalidRequest
from dualpath.transfer.pacer import BURST_BYTES, CATCH_UP_S, PIECE_BYTES, Pacer, TokenBucket
from hypothesis import given
from hypothesis import strategies as st


@given(
    st.floats(1e3, 1e10),
    st.integers(1, 1 << 20),
    st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0, 2)), min_size=1, max_size=60),
)
def test_never_more_passes_than_rate_times_time_plus_the_burst(
    rate: float, burst: int, asks: list[tuple[int, float]]
) -> None:
    bucket = TokenBucket(rate, burst)
    now, passed, last = 100.0, 0, 0.0
    for nbytes, idle_s in asks:
        now += idle_s
        ready_at = now + bucket.reserve(nbytes, now)
        assert ready_at >= last - 1e-6, "a later reservation overtook an earlier one"
        last = ready_at
        passed += nbytes
        allowed = burst + rate * (ready_at - 100.0 + CATCH_UP_S)
        assert passed <= allowed * (1 + 1e-9) + 1


def test_a_busy_bucket_wastes_nothing() -> None:
    bucket = TokenBucket(1000.0, 10)
    now = 0.0
    for _ in range(100):
        now += bucket.reserve(50, now)
    assert now == pytest.approx((100 * 50 - 10) / 1000)


def test_what_is_given_back_may_be_taken_again_up_to_the_burst() -> None:
    bucket = TokenBucket(1000.0, 100)
    assert bucket.reserve(100, 0.0) == 0
    bucket.give_back(60, 0.0)
    assert bucket.reserve(60, 0.0) == 0
    assert bucket.reserve(1, 0.0) == pytest.approx(0.001)
    bucket.give_back(1_000_000, 10.0)
    assert bucket.reserve(100, 10.0) == 0
    assert bucket.reserve(1, 10.0) > 0


def test_a_link_in_use_makes_up_for_late_threads_and_an_idle_one_does_not() -> None:
    bucket = TokenBucket(1e6, 100)
    bucket.reserve(100, 0.0)
    late = CATCH_UP_S * 0.9
    assert bucket.reserve(int(1e6 * late), late) == 0
    assert bucket.reserve(1000, 10.0) == pytest.approx(900 / 1e6)


def test_time_that_goes_backwards_gains_nothing() -> None:
    bucket = TokenBucket(1000.0, 1)
    bucket.reserve(1, 10.0)
    assert bucket.reserve(1, 5.0) == pytest.approx(0.001)


@pytest.mark.parametrize("rate", [-1.0, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused_by_value(rate: float) -> None:
    with pytest.raises(InvalidRequest, match=str(rate)):
        Pacer(rate)
    with pytest.raises(InvalidRequest):
        TokenBucket(rate, 1)


def test_no_limit_never_waits() -> None:
    pacer = Pacer(0)
    assert not pacer.limited
    assert all(pacer.pass_through(1 << 30, threading.Event()) for _ in range(100))


def test_pieces_and_burst_of_a_slow_link_are_those_that_hold_rates_best() -> None:
    pacer = Pacer(50e6)
    assert pacer.piece_bytes == PIECE_BYTES
    assert pacer.reserve(BURST_BYTES) == 0
    assert pacer.reserve(PIECE_BYTES) > time.monotonic()


def test_a_waiting_reservation_ends_when_it_is_stopped() -> None:
    pacer, stop = Pacer(1.0), threading.Event()
    results: list[bool] = []
    waiting = threading.Thread(target=lambda: results.append(pacer.pass_through(1 << 20, stop)))
    waiting.start()
    stop.set()
    waiting.join(10)
    assert results == [False]
