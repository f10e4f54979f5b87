"""The pure tables: leases, reservations."""

from __future__ import annotations

import numpy as np
import pytest
from dualpath.kvstore.lease_table import LeaseTable
from dualpath.kvstore.reservation_table import ReservationTable
from dualpath.transfer.errors import LeaseExpired, Overloaded, PermissionDenied
from hypothesis import given
from hypothesis import strategies as st

ROWS = np.array([1, 2], np.int32)


def test_a_lease_ends_at_its_time_and_not_before() -> None:
    leases = LeaseTable(10)
    lease = leases.grant("a", ROWS, 0, now=100.0, lease_s=5.0)
    assert leases.find(lease.id, 104.9) is lease
    assert leases.expire(104.9) == []
    with pytest.raises(LeaseExpired, match="look up again"):
        leases.find(lease.id, 105.0)
    assert leases.expire(105.0) == [lease]
    assert len(leases) == 0


def test_a_renewed_lease_outlives_its_first_time() -> None:
    leases = LeaseTable(10)
    lease = leases.grant("a", ROWS, 0, now=0.0, lease_s=5.0)
    leases.renew(lease.id, "a", now=4.0, lease_s=5.0)
    assert leases.expire(8.9) == []
    assert leases.expire(9.0) == [lease]
    with pytest.raises(LeaseExpired):
        leases.renew(lease.id, "a", now=9.0, lease_s=5.0)


def test_a_renewal_may_shorten() -> None:
    leases = LeaseTable(10)
    lease = leases.grant("a", ROWS, 0, now=0.0, lease_s=500.0)
    leases.renew(lease.id, "a", now=0.0, lease_s=1.0)
    assert leases.expire(1.0) == [lease]


def test_only_the_owner_renews_and_releases() -> None:
    leases = LeaseTable(10)
    lease = leases.grant("a", ROWS, 0, now=0.0, lease_s=5.0)
    with pytest.raises(PermissionDenied, match="another owner than 'b'"):
        leases.release(lease.id, "b")
    with pytest.raises(PermissionDenied):
        leases.renew(lease.id, "b", 0.0, 1.0)
    assert leases.release(lease.id, "a") is lease
    assert leases.release(lease.id, "a") is None


def test_leased_blocks_are_bounded() -> None:
    leases = LeaseTable(10, blocks_max=2 * len(ROWS))
    first = leases.grant("a", ROWS, 0, 0.0, 5.0)
    leases.grant("b", ROWS, 0, 0.0, 9.0)
    with pytest.raises(Overloaded, match=f"{2 * len(ROWS)} blocks are leased"):
        leases.grant("c", ROWS, 0, 0.0, 5.0)
    leases.release(first.id, "a")
    leases.grant("c", ROWS, 0, 0.0, 5.0)
    assert len(leases.expire(6.0)) == 1
    leases.grant("d", ROWS, 0, 6.0, 5.0)
    leases.forget("d")
    leases.grant("e", ROWS, 0, 6.0, 5.0)


def test_leases_are_bounded_and_forgotten_by_owner() -> None:
    leases = LeaseTable(2)
    first = leases.grant("a", ROWS, 0, 0.0, 5.0)
    leases.grant("b", ROWS, 0, 0.0, 5.0)
    with pytest.raises(Overloaded, match="2 leases"):
        leases.grant("a", ROWS, 0, 0.0, 5.0)
    assert leases.forget("a") == [first]
    assert len(leases) == 1


@given(st.lists(st.floats(0.1, 100.0), max_size=200))
def test_many_renewals_leave_no_heap_behind(times: list[float]) -> None:
    leases = LeaseTable(10)
    lease = leases.grant("a", ROWS, 0, 0.0, 1000.0)
    for lease_s in times:
        leases.renew(lease.id, "a", 0.0, 200.0 + lease_s)
        leases.expire(0.0)
    assert len(leases._expiries) <= 2 + 65


def test_reservations_expire_end_and_are_forgotten() -> None:
    table = ReservationTable(10)
    first = table.hold("a", 5, now=0.0, ttl_s=1.0)
    second = table.hold("a", 6, now=0.0, ttl_s=2.0)
    third = table.hold("b", 7, now=0.0, ttl_s=9.0)
    assert table.find(first.id, "a") == first
    with pytest.raises(PermissionDenied):
        table.find(first.id, "b")
    table.end(second.id)
    assert table.expire(0.5) == []
    assert table.expire(3.0) == [first]
    assert table.find(first.id, "a") is None
    assert table.forget("b") == [third]
    assert len(table) == 0


def test_reservations_are_bounded() -> None:
    table = ReservationTable(1)
    table.check_room(1)
    with pytest.raises(Overloaded, match="2 asked for"):
        table.check_room(2)
    table.hold("a", 1, 0.0, 1.0)
    assert table.is_full
    with pytest.raises(Overloaded):
        table.check_room(1)
