"""Random lives of rows under two tenants with quotas and two size classes: what leaves may leave,
nothing that may leave is forgotten, presence stays prefix-closed and the accounts are right."""

from __future__ import annotations

import numpy as np
from dualpath.kvstore.block_events import BlockEvents
from dualpath.kvstore.block_table import GONE, NO_ROW, BlockTable, RowState
from dualpath.kvstore.catalog import Catalog, NamespaceEntry
from dualpath.kvstore.device import MemoryDevice
from dualpath.kvstore.dram_tier import DramTier
from dualpath.kvstore.eviction import NONE
from dualpath.kvstore.eviction_choice import POLICIES
from dualpath.kvstore.expiry import Expiry
from dualpath.kvstore.layout import KVLayout
from dualpath.kvstore.namespace import Namespace
from dualpath.kvstore.residency import Residency
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.kvstore.store_api import MissReason, ReserveStatus
from dualpath.kvstore.tenant_limits import TenantLimits
from dualpath.kvstore.tenant_shares import TenantShares
from dualpath.kvstore.tier_order import TierOrder, Verdict
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

SMALL = KVLayout(layers=1, block_tokens=1, layer_bytes=8192, dtype="x")
LARGE = KVLayout(layers=1, block_tokens=1, layer_bytes=40_000, dtype="x")
SPACES = [
    Namespace(model="m", layout=layout, tenant=tenant)
    for tenant in ("", "a", "b")
    for layout in (SMALL, LARGE)
]
TENANTS = (
    TenantLimits(tenant="a", disk_bytes=72 << 10, dram_bytes=64 << 10),
    TenantLimits(tenant="b", disk_bytes=120 << 10, ttl_s=30),
)
DISK_BYTES = 280 << 10
DRAM_BYTES = 160 << 10
PICK = st.integers(0, 1 << 20)
SPACE = st.integers(0, len(SPACES) - 1)


class ResidencyMachine(RuleBasedStateMachine):
    """Rows are chosen by index among those that are in the right state."""

    @initialize(policy=st.sampled_from(list(POLICIES)))
    def start(self, policy: str) -> None:
        self.now = 100.0
        self.number = 0
        self.table = BlockTable()
        self.catalog = Catalog(self.table, 16, 64)
        self.tier = SsdTier(MemoryDevice(), DISK_BYTES, 56 << 10)
        self.arena = DramTier(DRAM_BYTES, 1 << 20, shared=False, prefault=False)
        self.residency = Residency(
            self.table,
            self.catalog,
            self.arena,
            self.tier,
            lambda *deleted: None,
            BlockEvents(64),
            policy=policy,
            tenants=TENANTS,
            clock=lambda: self.now,
        )
        self.expiry = Expiry(self.table, self.catalog, self.residency, 0, TENANTS)
        self.spaces = [self.catalog.open(space) for space in SPACES]
        self.residency.ssd._evict = self.evicting
        self.first_giver: tuple[int, list[int], int] | None = None
        self.leases: list[np.ndarray] = []
        self.pins: list[int] = []

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.close()

    def evicting(self, row: int, reason: MissReason) -> None:
        if self.first_giver is None:
            ssd = self.residency.ssd
            used = list(ssd.shares.used_bytes)
            self.first_giver = (ssd.bucket(self.entry(row)), used, self.tier.slots_bytes)
        self.residency.evict(row, reason)

    # What there is

    def rows(self, state: int) -> list[int]:
        return np.flatnonzero(self.table.state == state).tolist()

    def pick(self, rows: list[int], choice: int) -> int:
        return rows[choice % len(rows)]

    def path(self, row: int) -> np.ndarray:
        found = []
        while row >= 0:
            found.append(row)
            row = int(self.table.parent[row])
        return np.array(found[::-1], np.int32)

    def forget_giver(self) -> None:
        self.first_giver = None

    def entry(self, row: int) -> NamespaceEntry:
        return self.catalog.entry_of(row)

    def keeps(self, row: int) -> bool:
        """Whether the row may not leave now, naively."""
        table = self.table
        return bool(
            table.state[row] != RowState.PRESENT
            or any(table.parent == row)
            or table.leases[row]
            or table.pins[row]
            or table.dirty[row]
        )

    def retained(self, row: int) -> bool:
        return bool(self.table.retain_until[row] > self.residency.now_s())

    # What may happen

    @rule(space=SPACE, choice=PICK, lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4))
    def put_chains(self, space: int, choice: int, lengths: list[int]) -> None:
        """Blocks below some block, or new roots; sealed and written at once."""
        parent = self.above(space, choice)
        for length in lengths:
            for _ in range(length):
                row = self.reserve(space, parent)
                if isinstance(row, ReserveStatus):
                    break
                if parent == NO_ROW or self.table.state[parent] == RowState.PRESENT:
                    self.residency.publish(row, self.number, (7,), dirty=False)
                parent = row
            parent = NO_ROW

    @rule(space=SPACE, choice=PICK)
    def reserve_only(self, space: int, choice: int) -> None:
        self.reserve(space, self.above(space, choice))

    def above(self, space: int, choice: int) -> int:
        """A row that may get a child, or NO_ROW."""
        above = [
            row
            for state in (RowState.PRESENT, RowState.PENDING)
            for row in self.rows(state)
            if self.table.namespace[row] == self.spaces[space].index
            and self.table.parent[row] != GONE
        ]
        return self.pick([*above, NO_ROW], choice)

    def reserve(self, space: int, parent: int) -> int | ReserveStatus:
        entry = self.spaces[space]
        self.number += 1
        present = set(self.rows(RowState.PRESENT))
        kept = {row for row in present if self.keeps(row)} | {parent}
        retained = {row for row in present if self.retained(row)}
        ssd = self.residency.ssd
        bucket, size = ssd.bucket(entry), entry.layout.slot_bytes
        alike = {
            row
            for row in present - kept
            if ssd.bucket(self.entry(row)) == bucket and self.table.slot_bytes[row] == size
        }
        copies = {
            row
            for row in present
            if self.table.dram[row] >= 0
            and not (self.table.pins[row] or self.table.dirty[row])
            and self.residency.dram.bucket(self.entry(row)) == self.residency.dram.bucket(entry)
            and self.table.slot_bytes[row] == size
        }
        self.forget_giver()
        outcome = self.residency.reserve(entry, b"%032d" % self.number, parent, "owner")
        gone = present - set(self.rows(RowState.PRESENT))
        inner = {row for row in kept if row in gone and not self.table.leases[row]}
        # With a segment inner rows leave, but only together with all that hangs below them.
        assert all(row in inner or row not in kept for row in gone)
        if outcome is ReserveStatus.QUOTA:
            assert not alike
        elif outcome is ReserveStatus.FULL:
            assert not alike or not copies
        if gone & retained:
            assert not alike - retained
        if self.first_giver is not None:
            other, used, capacity = self.first_giver
            # Who gives is fuller than the taker.
            mine = (used[bucket] + size) * ssd.shares.share_bytes(other, capacity)
            his = used[other] * ssd.shares.share_bytes(bucket, capacity)
            assert other == bucket or his > mine
        return outcome

    @precondition(lambda self: self.rows(RowState.PENDING))
    @rule(choice=PICK, dirty=st.booleans())
    def publish(self, choice: int, dirty: bool) -> None:
        row = self.pick(self.rows(RowState.PENDING), choice)
        parent = int(self.table.parent[row])
        if parent == NO_ROW or (parent >= 0 and self.table.state[parent] == RowState.PRESENT):
            self.residency.publish(row, self.number, (7,), dirty=dirty)

    @precondition(lambda self: self.rows(RowState.PENDING))
    @rule(choice=PICK)
    def give_up(self, choice: int) -> None:
        self.residency.drop_pending(self.pick(self.rows(RowState.PENDING), choice))

    @precondition(lambda self: self.rows(RowState.PENDING))
    @rule(choice=PICK)
    def orphan(self, choice: int) -> None:
        row = self.pick(self.rows(RowState.PENDING), choice)
        if self.table.parent[row] != GONE:
            self.residency.orphan(row)

    @precondition(lambda self: self.rows(RowState.PRESENT))
    @rule(choice=PICK, lease=st.booleans())
    def use(self, choice: int, lease: bool) -> None:
        rows = self.path(self.pick(self.rows(RowState.PRESENT), choice))
        self.residency.touch(rows)
        if lease:
            self.table.leases[rows] += 1
            self.leases.append(rows)

    @precondition(lambda self: self.leases)
    @rule(choice=PICK)
    def end_lease(self, choice: int) -> None:
        self.residency.unlease(self.leases.pop(choice % len(self.leases)))

    @precondition(lambda self: self.rows(RowState.PRESENT))
    @rule(choice=PICK)
    def pin(self, choice: int) -> None:
        row = self.pick(self.rows(RowState.PRESENT), choice)
        self.table.pins[row] += 1
        self.pins.append(row)

    @precondition(lambda self: self.pins)
    @rule(choice=PICK, many=st.booleans())
    def unpin(self, choice: int, many: bool) -> None:
        if many:
            different = sorted(set(self.pins))
            for row in different:
                self.pins.remove(row)
            self.residency.unpin_rows(np.array(different, np.int32))
        else:
            self.residency.unpin(self.pins.pop(choice % len(self.pins)))

    @rule(choice=PICK)
    def write_back(self, choice: int) -> None:
        dirty = [row for row in self.rows(RowState.PRESENT) if self.table.dirty[row]]
        if dirty:
            self.residency.set_dirty(self.pick(dirty, choice), dirty=False)

    @rule(choice=PICK)
    def promote(self, choice: int) -> None:
        cold = [row for row in self.rows(RowState.PRESENT) if self.table.dram[row] < 0]
        if cold:
            self.residency.promote(self.pick(cold, choice))

    @precondition(lambda self: self.rows(RowState.PRESENT))
    @rule(choice=PICK)
    def corrupt(self, choice: int) -> None:
        row = self.pick(self.rows(RowState.PRESENT), choice)
        self.residency.drop(row, MissReason.CORRUPT)

    @precondition(lambda self: self.rows(RowState.PRESENT))
    @rule(choice=PICK, seconds=st.integers(1, 100))
    def retain(self, choice: int, seconds: int) -> None:
        rows = self.path(self.pick(self.rows(RowState.PRESENT), choice))
        self.table.retain_until[rows] = self.residency.now_s() + seconds

    @rule(seconds=st.integers(1, 40))
    def later(self, seconds: int) -> None:
        self.now += seconds
        now_s = self.residency.now_s()
        old = {
            row
            for row in self.rows(RowState.PRESENT)
            if self.expiry.ttl_s(self.entry(row)) and now_s - self.table.used_s[row] >= 30
        }
        before = {row: self.keeps(row) for row in self.rows(RowState.PRESENT)}
        while self.expiry.sweep():
            pass
        gone = set(before) - set(self.rows(RowState.PRESENT))
        assert gone <= old
        assert {row for row in old if not before[row]} <= gone
        ended = np.flatnonzero((self.table.retain_until > 0) & (self.table.retain_until <= now_s))
        self.table.retain_until[ended] = 0
        self.residency.settle_all(ended.astype(np.int32))

    # What must hold

    @invariant()
    def presence_is_prefix_closed(self) -> None:
        table = self.table
        for row in self.rows(RowState.PRESENT):
            parent = int(table.parent[row])
            assert parent == NO_ROW or table.state[parent] == RowState.PRESENT

    @invariant()
    def nothing_that_may_leave_is_forgotten(self) -> None:
        table = self.table
        self.check(self.residency.ssd.order, set(self.rows(RowState.PRESENT)))
        with_copy = {row for row in self.rows(RowState.PRESENT) if table.dram[row] >= 0}
        self.check(self.residency.dram.order, with_copy)

    def check(self, order: TierOrder, expected: set[int]) -> None:
        policy = order.policy
        known = {row for row in range(self.table.rows) if policy.group_of(row) != NONE}
        dead = {row for row in known if self.table.state[row] == RowState.DEAD}
        assert known - dead == expected
        parked = set(policy.parked(np.array(sorted(expected), np.int32)).tolist())
        for row in parked - {row for spare in order._spare for row in spare}:
            assert order._verdict(row) is Verdict.STAY
        for row in expected - parked:
            # An inner row is parked as soon as it has a child.
            inner = order is self.residency.ssd.order and self.table.first_child[row] != NO_ROW
            assert not inner
        if order is self.residency.ssd.order:
            for row in expected:
                assert (order._verdict(row) is Verdict.STAY) == self.keeps(row)

    @invariant()
    def the_accounts_are_right(self) -> None:
        table = self.table
        for space, held in ((self.residency.ssd, table.segment), (self.residency.dram, table.dram)):
            used = [0] * len(space.shares.buckets())
            for row in np.flatnonzero(held >= 0).tolist():
                used[space.bucket(self.entry(row))] += int(table.slot_bytes[row])
            assert space.shares.used_bytes == used
            for bucket in space.shares.buckets():
                assert not space.shares.over_quota(bucket, 0)


ResidencyMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None
)
TestRandomLives = ResidencyMachine.TestCase


# Shares


def test_without_quotas_everybody_is_one_bucket() -> None:
    shares = TenantShares({})
    assert shares.bucket("x") == shares.bucket("") == 0
    assert not shares.over_quota(0, 1 << 60)
    assert shares.givers(0, 1, 100) == [0]


def test_at_his_quota_a_tenant_makes_room_among_his_own() -> None:
    shares = TenantShares({"a": 100})
    shares.take(shares.bucket("a"), 90)
    assert not shares.over_quota(shares.bucket("a"), 10)
    assert shares.over_quota(shares.bucket("a"), 11)


def test_the_fullest_gives_and_never_to_one_who_is_fuller() -> None:
    shares = TenantShares({"a": 400, "b": 400})
    a, b = shares.bucket("a"), shares.bucket("b")
    shares.take(a, 100)
    shares.take(b, 380)
    shares.take(0, 520)
    assert shares.share_bytes(0, 1000) == 200
    assert shares.givers(a, 10, 1000) == [0, b, a]
    assert shares.givers(b, 10, 1000) == [0, b]
    assert shares.givers(0, 10, 1000) == [0]


def test_quotas_beyond_the_tier_are_scaled_down() -> None:
    shares = TenantShares({"a": 900, "b": 300})
    assert shares.share_bytes(shares.bucket("a"), 600) == 450
    assert shares.share_bytes(shares.bucket("b"), 600) == 150
    shares.take(0, 1)
    assert shares.givers(shares.bucket("b"), 100, 600)[0] == 0
