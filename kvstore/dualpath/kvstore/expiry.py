"""Blocks that nobody has used for their time to live leave: found by and by, a slice at a time.

The time counts from the last use: a lookup that found the block, the end of a lease on it, the save
that stored it or found it stored. Uses are kept in memory, so opening a store counts as one. A
block lives as long as one below it does, since presence is prefix-closed; what is leased, pinned or
not yet written back waits. A block leaves within about a second of its time while the store is
idle, and no lookup that ends with it finds it any more. Retention does not prolong it. Needs the
store's lock; does no I/O.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from dualpath.kvstore.block_table import NO_ROW, BlockTable, RowState
from dualpath.kvstore.catalog import Catalog, NamespaceEntry
from dualpath.kvstore.residency import Residency
from dualpath.kvstore.store_api import MissReason
from dualpath.kvstore.tenant_limits import TenantLimits
from numpy.typing import NDArray

SLICE_ROWS = 1 << 16
"""Rows that one `sweep` looks at."""
EVICTED_AT_ONCE = 256
"""Most blocks that one `sweep` lets go: between two chances for others to take the lock."""


class Expiry:
    """See the module docstring. `ttl_s` holds for tenants without one of their own, in whole
    seconds, rounded up; 0: never."""

    def __init__(
        self,
        table: BlockTable,
        catalog: Catalog,
        residency: Residency,
        ttl_s: float,
        tenants: Sequence[TenantLimits],
    ) -> None:
        self._table = table
        self._catalog = catalog
        self._residency = residency
        self._default_s = ttl_s
        self._of_tenant = {each.tenant: each.ttl_s for each in tenants if each.ttl_s}
        self._next_row = 0
        self.active = bool(ttl_s or self._of_tenant)
        """Whether any block may ever expire."""

    def ttl_s(self, entry: NamespaceEntry) -> float:
        """Of the namespace's blocks; 0: they never expire."""
        return self._of_tenant.get(entry.namespace.tenant, self._default_s)

    def trim(self, entry: NamespaceEntry, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """A prefix of the namespace without what has expired at its end; that leaves now."""
        ttl_s = math.ceil(self.ttl_s(entry)) if self.active else 0
        if not ttl_s:
            return rows
        left, oldest = len(rows), self._residency.now_s() - ttl_s
        while left and self._expired(int(rows[left - 1]), oldest):
            self._residency.evict(int(rows[left - 1]), MissReason.EXPIRED)
            left -= 1
        return rows[:left]

    def sweep(self) -> bool:
        """Look at the next slice; False once all rows were looked at, and the next call begins
        anew."""
        table = self._table
        if not self.active:
            return False
        first = self._next_row
        end = min(first + SLICE_ROWS, table.rows)
        ttl = self._catalog.by_number(lambda entry: math.ceil(self.ttl_s(entry)))
        now_s = self._residency.now_s()
        inside = slice(first, end)
        ttls = ttl[table.namespace[inside]] if len(ttl) else np.zeros(end - first, np.int64)
        due = (table.state[inside] == RowState.PRESENT) & (ttls > 0)
        due &= now_s - table.used_s[inside].astype(np.int64) >= ttls
        due &= table.first_child[inside] == NO_ROW
        gone = 0
        for row in (first + np.flatnonzero(due)).tolist():
            if gone >= EVICTED_AT_ONCE:
                return True
            gone += self._climb(row, now_s - int(ttl[table.namespace[row]]))
        self._next_row = end if end < table.rows else 0
        return end < table.rows

    def _climb(self, row: int, oldest_s: float) -> int:
        """Let a leaf go, and then its ancestors, as far as they have expired, too."""
        gone = 0
        while row >= 0 and gone < EVICTED_AT_ONCE and self._expired(row, oldest_s):
            above = int(self._table.parent[row])
            self._residency.evict(row, MissReason.EXPIRED)
            gone += 1
            row = above
        return gone

    def _expired(self, row: int, oldest_s: float) -> bool:
        table = self._table
        return bool(
            table.state[row] == RowState.PRESENT
            and table.used_s[row] <= oldest_s
            and table.first_child[row] == NO_ROW
            and table.leases[row] == 0
            and table.pins[row] == 0
            and not table.dirty[row]
        )
