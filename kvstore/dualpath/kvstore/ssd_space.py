"""Places on SSD: who may leave for a new block, so that presence stays prefix-closed.

Owns the order of eviction and the tenants' use of the disk. Only a leaf makes way: not leased, not
pinned, written back, with no child, in a slot that is given out again; one under retention only
when nothing else may. A size class that finds neither a free slot nor a victim of its own gets a
segment of others': the coldest one that can be emptied. Decides only; its owner evicts. Needs the
store's lock; does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from dualpath.kvstore.block_table import NO_ROW, BlockTable, RowState
from dualpath.kvstore.catalog import Catalog, NamespaceEntry
from dualpath.kvstore.eviction import NONE, EvictionPolicy
from dualpath.kvstore.segment import SegmentGeometry
from dualpath.kvstore.space_plan import coldest_extents, means
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.kvstore.store_api import MissReason, ReserveStatus
from dualpath.kvstore.tenant_shares import TenantShares
from dualpath.kvstore.tier_order import TierOrder, Verdict
from numpy.typing import NDArray

_SEGMENTS_TRIED_MAX = 8
"""Most segments that are looked at closely for one that can be emptied."""
_CLOSURE_MAX = 1 << 16
"""Most blocks that leave with a segment, those that hang below its own included."""
_BALANCE_SHARE = 16
"""Size classes are compared once for so many evictions: a 16th of the rows of the table."""
_BALANCE_MIN = 256

Evict = Callable[[int, MissReason], None]
"""Make a leaf leave."""


class SsdSpace:
    """See the module docstring. `now_s` tells seconds since opening, on the scale of the columns
    `used_s` and `retain_until`."""

    def __init__(
        self,
        table: BlockTable,
        catalog: Catalog,
        tier: SsdTier,
        policy: EvictionPolicy,
        shares: TenantShares,
        evict: Evict,
        now_s: Callable[[], int],
    ) -> None:
        self._table = table
        self._catalog = catalog
        self._tier = tier
        self._order = TierOrder(policy, self._verdict)
        self._evict = evict
        self._now_s = now_s
        self._until_balance = _BALANCE_MIN
        self.shares = shares
        self.evicted = 0
        """Blocks that made way."""

    @property
    def order(self) -> TierOrder:
        """Told of uses, and of what kept a block and is over."""
        return self._order

    def take(self, entry: NamespaceEntry) -> tuple[int, int] | ReserveStatus:
        """(segment, slot) for a block of the namespace; FULL, or QUOTA if the tenant is at its
        quota, when nothing may make way."""
        bucket, slot_bytes = self.bucket(entry), entry.layout.slot_bytes
        if SegmentGeometry(slot_bytes, 1).file_bytes > self._tier.capacity_bytes:
            return ReserveStatus.FULL
        while True:
            if self.shares.over_quota(bucket, slot_bytes):
                row = self._order.victim([bucket], slot_bytes, any_size=True, spare=True)
                if row == NONE:
                    return ReserveStatus.QUOTA
                self._make_way(row, MissReason.QUOTA)
                continue
            place = self._tier.take(slot_bytes)
            if place is not None:
                self.shares.take(bucket, slot_bytes)
                return place
            givers = self.shares.givers(bucket, slot_bytes, self._tier.slots_bytes)
            row = self._order.victim(givers, slot_bytes, any_size=False, spare=False)
            if row != NONE and not self._balance(row, givers, slot_bytes):
                self._make_way(row, MissReason.EVICTED)
            elif row == NONE and not self._empty_segment(givers, slot_bytes):
                row = self._order.victim(givers, slot_bytes, any_size=False, spare=True)
                if row != NONE:
                    self._make_way(row, MissReason.EVICTED)
                elif not self._empty_segment(givers, slot_bytes, spare=True):
                    return ReserveStatus.FULL

    def give(self, row: int) -> None:
        """The row's slot is free."""
        table, entry = self._table, self._catalog.entry_of(row)
        self._tier.give(int(table.segment[row]), int(table.slot[row]))
        self.shares.give(self.bucket(entry), entry.layout.slot_bytes)
        table.segment[row] = table.slot[row] = -1

    def enter(self, row: int, key: int, *, extends: int = NONE) -> None:
        """The row's block is present from now on."""
        entry = self._catalog.entry_of(row)
        parked = bool(self._table.first_child[row] != NO_ROW or self._table.dirty[row])
        bucket, slot_bytes = self.bucket(entry), entry.layout.slot_bytes
        self._order.enter(row, bucket, slot_bytes, key, extends=extends, parked=parked)

    def fill(self, rows: NDArray[np.int32]) -> None:
        """Blocks that were found at opening, the first to go first."""
        table = self._table
        buckets = self._catalog.by_number(self.bucket)[table.namespace[rows]]
        sizes, parked = table.slot_bytes[rows], table.first_child[rows] != NO_ROW
        for bucket in np.unique(buckets).tolist():
            for slot_bytes in np.unique(sizes[buckets == bucket]).tolist():
                chosen = (buckets == bucket) & (sizes == slot_bytes)
                self.shares.take(bucket, slot_bytes * int(chosen.sum()))
                self._order.fill(rows[chosen], bucket, slot_bytes, parked[chosen])

    def bucket(self, entry: NamespaceEntry) -> int:
        """Whose account the namespace's blocks are on."""
        return self.shares.bucket(entry.namespace.tenant)

    def _make_way(self, row: int, reason: MissReason) -> None:
        self.evicted += 1
        self._until_balance -= 1
        self._evict(row, reason)

    def _verdict(self, row: int) -> Verdict:
        table = self._table
        if (
            table.state[row] != RowState.PRESENT
            or table.first_child[row] != NO_ROW
            or table.leases[row]
            or table.pins[row]
            or table.dirty[row]
            or (self._tier.suspended and int(table.segment[row]) in self._tier.suspended)
        ):
            return Verdict.STAY
        retained = table.retain_until[row]
        return Verdict.SPARE if retained and retained > self._now_s() else Verdict.GO

    # Whole segments

    def _balance(self, row: int, givers: Sequence[int], slot_bytes: int) -> bool:
        """Whether another size class gave a segment, because all of that was used before `row`,
        the next victim of this one. Looks once in many evictions."""
        if self._until_balance > 0:
            return False
        self._until_balance = max(_BALANCE_MIN, self._table.rows // _BALANCE_SHARE)
        if not self._order.has_other_sizes(slot_bytes):
            return False
        return self._empty_segment(givers, slot_bytes, before=int(self._table.used[row]))

    def _empty_segment(
        self,
        givers: Sequence[int],
        slot_bytes: int,
        *,
        before: int | None = None,
        spare: bool = False,
    ) -> bool:
        """Evict the blocks of the coldest segment of another size class, with what hangs below
        them. False if none can be emptied, or with `before` if its last use is not before that.
        With `spare` also what is under retention goes."""
        if not self._order.has_other_sizes(slot_bytes):
            return False
        table = self._table
        rows = np.flatnonzero(table.segment >= 0)
        segments, used = table.segment[rows], table.used[rows]
        blocked = self._blocked(rows, givers, spare)
        _, cold = means(segments, used, blocked)
        for segment in coldest_extents(segments, used, blocked)[:_SEGMENTS_TRIED_MAX]:
            if before is not None and cold[segment] >= before:
                return False
            members = rows[segments == segment]
            if table.slot_bytes[members[0]] == slot_bytes:
                continue
            leaving = self._closure(members, givers, spare)
            if leaving is not None:
                for row in reversed(leaving):
                    self._make_way(row, MissReason.EVICTED)
                return True
        return False

    def _closure(
        self, members: NDArray[np.int64], givers: Sequence[int], spare: bool
    ) -> list[int] | None:
        """The blocks and all their descendants, parents first; None if one of those may not go."""
        order = members.tolist()
        seen = set(order)
        for row in order:
            below = [child for child in self._table.children(row) if child not in seen]
            order += below
            seen.update(below)
            if len(order) > _CLOSURE_MAX:
                return None
        rows = np.array(order)
        if self._blocked(rows, givers, spare).any():
            return None
        # A member may stand before its parent, if that is a member, too.
        parents_first = np.argsort(self._table.generation[rows], kind="stable")
        return [order[at] for at in parents_first.tolist()]

    def _blocked(
        self, rows: NDArray[np.int64], givers: Sequence[int], spare: bool
    ) -> NDArray[np.bool_]:
        """Which rows may not go, were they leaves."""
        table = self._table
        blocked: NDArray[np.bool_] = (table.state[rows] != RowState.PRESENT) | table.dirty[rows]
        blocked |= (table.leases[rows] > 0) | (table.pins[rows] > 0)
        if self._tier.suspended:
            blocked |= np.isin(table.segment[rows], list(self._tier.suspended))
        if not spare:
            blocked |= table.retain_until[rows] > self._now_s()
        if len(givers) < len(self.shares.buckets()):
            blocked |= ~np.isin(self._catalog.by_number(self.bucket)[table.namespace[rows]], givers)
        return blocked
