"""Leases keep blocks from eviction: nobody may keep more than is left for the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dualpath.kvstore.lease_shares import COUNT_PERIOD_S, LeaseShares, ShareRule
from dualpath.kvstore.lease_table import LeaseTable
from dualpath.transfer.errors import Overloaded

ROWS = 100
SLOT = 1000
CAPACITY = ROWS * SLOT


class _Store:
    """A table of `ROWS` blocks, and who leases them."""

    def __init__(self, limits: dict[str, int] | None = None, times: int = 1) -> None:
        table: Any = SimpleNamespace(
            rows=ROWS, leases=np.zeros(ROWS, np.int32), slot_bytes=np.full(ROWS, SLOT, np.int32)
        )
        self.table = table
        self.leases = LeaseTable(1000)
        self.now = 0.0
        self._limits = limits or {}
        rule = ShareRule(limit_of=lambda holder: self._limits.get(holder, 0), times=times)
        self._shares = LeaseShares(table, self.leases, CAPACITY, rule)

    def lease(self, holder: str, first: int, count: int) -> int:
        """The id of a lease of these rows."""
        rows = np.arange(first, first + count, dtype=np.int32)
        self._shares.check(holder, rows, count * SLOT, self.now)
        self.table.leases[rows] += 1
        return self.leases.grant(
            "owner", rows, 0, self.now, 60.0, holder=holder, nbytes=count * SLOT
        ).id

    def release(self, lease_id: int) -> None:
        """End a lease."""
        lease = self.leases.release(lease_id, "owner")
        assert lease is not None
        self.table.leases[lease.rows] -= 1

    def leased(self, holder: str, first: int) -> int:
        """How many single rows from `first` on it gets until it is refused."""
        for count in range(ROWS - first):
            try:
                self.lease(holder, first + count, 1)
            except Overloaded:
                return count
        return ROWS - first


def test_each_holder_gets_half_of_what_the_others_left() -> None:
    store = _Store()
    assert store.leased("a", 0) == 50
    assert store.leased("b", 50) == 25
    assert store.leased("c", 75) == 12
    with pytest.raises(Overloaded, match="a would have 51000 bytes") as caught:
        store.lease("a", 99, 1)
    assert caught.value.reason == "quota"


def test_who_may_have_seven_times_what_is_left_leaves_an_eighth() -> None:
    assert _Store(times=7).leased("a", 0) == 87


def test_a_block_that_is_leased_often_counts_once() -> None:
    store = _Store()
    for _ in range(20):
        store.lease("a", 0, 40)
        store.lease("b", 0, 40)
    assert store.leased("a", 40) == 10


def test_what_is_released_may_be_leased_at_once_by_another() -> None:
    store = _Store()
    lease = store.lease("a", 0, 50)
    with pytest.raises(Overloaded):
        store.lease("b", 50, 40)
    store.release(lease)
    store.now += COUNT_PERIOD_S / 2
    store.lease("b", 50, 40)


def test_attempts_that_are_refused_take_nothing_from_the_others() -> None:
    store = _Store()
    store.lease("a", 0, 50)
    for _ in range(100):
        with pytest.raises(Overloaded):
            store.lease("a", 50, 40)
    store.lease("b", 50, 25)


def test_a_limit_of_ones_own_holds_also_while_little_is_leased() -> None:
    store = _Store({"a": 10 * SLOT})
    assert store.leased("a", 0) == 10
    assert store.leased("b", 10) == 45
    store.lease("a", 0, 10)  # the same again
