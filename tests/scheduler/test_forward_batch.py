"""A forward batch keeps to its quota and to the order of arrival, and wastes none of it."""

from __future__ import annotations

import math

import pytest
from dualpath.scheduler.forward_batch import PrefillWork, QuotaBatching
from dualpath.transfer.errors import InvalidRequest
from hypothesis import given
from hypothesis import strategies as st

QUOTA_S = 0.3
works = st.lists(st.tuples(st.integers(0, 60_000), st.integers(1, 4000)), max_size=40)


def attention_s(cached: int, new: int) -> float:
    return new * (cached + new / 2) * 2e-9


def waiting_of(sizes: list[tuple[int, int]]) -> list[PrefillWork]:
    return [PrefillWork(f"r{n}", cached, new) for n, (cached, new) in enumerate(sizes)]


@given(works)
def test_the_quota_is_kept_and_the_next_token_would_exceed_it(sizes: list[tuple[int, int]]) -> None:
    waiting = waiting_of(sizes)
    batch = QuotaBatching(attention_s, quota_s=QUOTA_S).fill(waiting)
    spent = sum(attention_s(work.cached, work.new) for work in batch.works)
    assert spent == pytest.approx(batch.attention_s)
    assert batch.attention_s <= QUOTA_S
    taken = len(batch.works)
    for work, asked in zip(batch.works[:-1], waiting, strict=False):
        assert work == asked
    if not batch.works:
        assert not waiting
        return
    last, asked = batch.works[-1], waiting[taken - 1]
    assert (last.request, last.cached) == (asked.request, asked.cached)
    if last.new < asked.new:
        before = batch.attention_s - attention_s(last.cached, last.new)
        assert before + attention_s(last.cached, last.new + 1) > QUOTA_S * (1 - 1e-9)
    elif taken < len(waiting):
        following = waiting[taken]
        assert batch.attention_s + attention_s(following.cached, 1) > QUOTA_S * (1 - 1e-9)


@given(works)
def test_all_that_waits_is_computed_once_in_order_by_batch_after_batch(
    sizes: list[tuple[int, int]],
) -> None:
    policy, waiting = QuotaBatching(attention_s, quota_s=QUOTA_S), waiting_of(sizes)
    done = {work.request: 0 for work in waiting}
    while waiting:
        batch = policy.fill(waiting)
        assert batch.works
        for work in batch.works:
            head = waiting.pop(0)
            assert work.request == head.request
            done[work.request] += work.new
            if work.new < head.new:
                left = head.new - work.new
                waiting.insert(0, PrefillWork(head.request, head.cached + work.new, left))
    assert done == {f"r{n}": new for n, (_, new) in enumerate(sizes)}


def test_one_token_goes_in_whatever_it_takes() -> None:
    batch = QuotaBatching(lambda cached, new: 1.0 * new, quota_s=QUOTA_S).fill(waiting_of([(0, 5)]))
    assert [work.new for work in batch.works] == [1]


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_a_prediction_that_is_no_time_is_refused(seconds: float) -> None:
    policy = QuotaBatching(lambda cached, new: seconds)
    with pytest.raises(InvalidRequest, match="attention_s"):
        policy.fill(waiting_of([(0, 5)]))
