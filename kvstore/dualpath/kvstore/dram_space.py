"""Copies in DRAM: who has one, and who gives his up for another.

Owns the order of demotion, the tenants' use of the arena and the columns `dram`, `filled` and
`resident` of the block table. A copy may go while the block stays on SSD; one that is leased goes
only for a write, one that is pinned or not yet written back never. Needs the store's lock; no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from dualpath.kvstore.block_table import BlockTable, RowState
from dualpath.kvstore.catalog import Catalog, NamespaceEntry
from dualpath.kvstore.dram_tier import DramTier
from dualpath.kvstore.eviction import NONE, EvictionPolicy
from dualpath.kvstore.tenant_shares import TenantShares
from dualpath.kvstore.tier_order import TierOrder, Verdict

NO_OFFSET = -1


class DramSpace:
    """See the module docstring."""

    def __init__(
        self,
        table: BlockTable,
        catalog: Catalog,
        tier: DramTier,
        policy: EvictionPolicy,
        shares: TenantShares,
    ) -> None:
        self._table = table
        self._catalog = catalog
        self._tier = tier
        self._order = TierOrder(policy, self._verdict)
        self.shares = shares
        self.demoted = 0
        """Copies that were given up for others."""

    @property
    def order(self) -> TierOrder:
        """Told of uses, and of what kept a copy and is over."""
        return self._order

    def take(self, entry: NamespaceEntry, *, for_write: bool) -> int:
        """Offset of a slot for a block of the namespace; NO_OFFSET if nothing may make way."""
        bucket, slot_bytes = self.bucket(entry), entry.layout.slot_bytes
        slots, shares = self._tier.slots, self.shares
        if slot_bytes > slots.capacity_bytes:
            return NO_OFFSET
        while True:
            own_only = shares.over_quota(bucket, slot_bytes)
            if not own_only:
                offset = slots.take(slot_bytes)
                if offset >= 0:
                    shares.take(bucket, slot_bytes)
                    return offset
                givers = shares.givers(bucket, slot_bytes, slots.capacity_bytes)
            else:
                givers = [bucket]
            row = self._order.victim(givers, slot_bytes, any_size=own_only, spare=for_write)
            if row != NONE:
                self._demote(row)
            elif own_only or not self._clear_window(givers, slot_bytes, for_write=for_write):
                return NO_OFFSET

    def enter(self, row: int, key: int, *, extends: int = NONE) -> None:
        """The row's slot holds, or is about to hold, its published block."""
        entry = self._catalog.entry_of(row)
        parked = bool(self._table.dirty[row])
        bucket, slot_bytes = self.bucket(entry), entry.layout.slot_bytes
        self._order.enter(row, bucket, slot_bytes, key, extends=extends, parked=parked)

    def free(self, row: int, key: int = 0) -> None:
        """Give the row's slot back; with `key` because it had to make way."""
        table, entry = self._table, self._catalog.entry_of(row)
        self._order.leave(row, key)
        self._tier.slots.give(int(table.dram[row]))
        self.shares.give(self.bucket(entry), entry.layout.slot_bytes)
        table.dram[row] = NO_OFFSET
        table.filled[row] = 0
        table.resident[row] = False

    def bucket(self, entry: NamespaceEntry) -> int:
        """Whose account the namespace's blocks are on."""
        return self.shares.bucket(entry.namespace.tenant)

    def _demote(self, row: int) -> None:
        self.demoted += 1
        self.free(row, key=self._table.fingerprint(row))

    def _clear_window(self, givers: Sequence[int], slot_bytes: int, *, for_write: bool) -> bool:
        """Demote all copies of the coldest stretch that a slot of the size fits in."""
        if not self._order.has_other_sizes(slot_bytes):
            return False
        table = self._table
        rows = np.flatnonzero(table.dram >= 0)
        blocked = (table.state[rows] != RowState.PRESENT) | (table.pins[rows] > 0)
        blocked |= table.dirty[rows]
        if not for_write:
            blocked |= table.leases[rows] > 0
        if len(givers) < len(self.shares.buckets()):
            blocked |= ~np.isin(self._catalog.by_number(self.bucket)[table.namespace[rows]], givers)
        slots = self._tier.slots
        found = slots.coldest_window(table.dram[rows], table.used[rows], blocked, slot_bytes)
        for row in rows[found].tolist():
            self._demote(row)
        return bool(len(found))

    def _verdict(self, row: int) -> Verdict:
        table = self._table
        if (
            table.state[row] != RowState.PRESENT
            or table.dram[row] < 0
            or table.pins[row]
            or table.dirty[row]
        ):
            return Verdict.STAY
        return Verdict.SPARE if table.leases[row] else Verdict.GO
