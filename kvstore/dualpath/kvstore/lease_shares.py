"""How much of the SSD tier one holder of leases may keep from being evicted.

Owns the refusal: nobody may have leased more than is left for all others, or so many times that,
each block counted once however often it is leased. So whatever one holder does, others can write,
and one more can lease. Costs next to nothing while less of the tier is leased than one may have;
beyond that, what is leased is counted a few times a second. The caller holds the store's lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from dualpath.kvstore.block_table import BlockTable
from dualpath.kvstore.lease_table import LeaseTable
from dualpath.transfer.errors import Overloaded
from numpy.typing import NDArray

COUNT_PERIOD_S = 0.25
RECOUNT_PERIOD_S = 0.01
"""Between two counts if the former would have refused somebody: leases may have ended since."""
COUNT_SHARE = 20
"""Counting may take one of so many parts of the time."""
COUNTED_MAX = 32
"""Holders for which a byte a row is kept, so that they need not be counted anew."""


@dataclass(slots=True)
class _Count:
    """Bytes that were leased `at` some time or since; some of the leases may have ended. `rows`:
    which, where they are a holder's."""

    nbytes: int
    at: float
    took_s: float
    rows: NDArray[np.bool_]

    def is_old(self, now: float, period_s: float) -> bool:
        return now >= self.at + max(period_s, COUNT_SHARE * self.took_s)


@dataclass(frozen=True, slots=True)
class ShareRule:
    """`holder_of` tells of whose share the leases of an owner are, `limit_of` a holder's own limit
    in bytes, 0 for none; both are called under the store's lock. One may have `times` what is
    left."""

    holder_of: Callable[[str], str] = str
    limit_of: Callable[[str], int] = lambda _: 0
    times: int = 1


class LeaseShares:
    """See the module docstring."""

    def __init__(
        self,
        table: BlockTable,
        leases: LeaseTable,
        capacity_bytes: int,
        rule: ShareRule,
    ) -> None:
        self._table = table
        self._leases = leases
        self._capacity_bytes = capacity_bytes
        self._rule = rule
        self._unshared_bytes = capacity_bytes * rule.times // (rule.times + 1)
        self._held: dict[str, _Count] = {}
        self._all: _Count | None = None

    def check(self, holder: str, rows: NDArray[np.int32], nbytes: int, now: float) -> None:
        """Before a lease of these rows. Raises Overloaded, reason `quota`."""
        limit = self._rule.limit_of(holder) or self._capacity_bytes
        if self._leases.nbytes + nbytes <= min(limit, self._unshared_bytes):
            self._held.pop(holder, None)  # what is not counted on would be too few
            self._all = None
            return
        if self._take(holder, rows, limit, now, COUNT_PERIOD_S) is None:
            return
        refused = self._take(holder, rows, limit, now, RECOUNT_PERIOD_S)
        if refused is not None:
            would, most = refused
            raise Overloaded(
                f"{holder} would have {would} bytes of blocks leased and may have {max(0, most)}: "
                "no more than its limit, nor than is left for others; release some leases",
                retry_after_s=1.0,
                reason="quota",
            )

    def _take(
        self, holder: str, rows: NDArray[np.int32], limit: int, now: float, period_s: float
    ) -> tuple[int, int] | None:
        """Count these rows as leased; if they are too many, (bytes, most bytes) instead."""
        everybody = self._count_all(now, period_s)
        fresh = self._bytes_of(rows[self._table.leases[rows] == 0])
        most = min(limit, self._rule.times * (self._capacity_bytes - everybody.nbytes - fresh))
        mine = self._count(holder, now, period_s)
        added = rows[~mine.rows[rows]]
        would = mine.nbytes + self._bytes_of(added)
        if would > most:
            return would, most
        everybody.nbytes += fresh
        mine.rows[added] = True
        mine.nbytes = would
        return None

    def _count_all(self, now: float, period_s: float) -> _Count:
        known = self._all
        if known is None or known.is_old(now, period_s):
            start = time.perf_counter()
            nbytes = self._bytes_of(np.flatnonzero(self._table.leases))
            known = _Count(nbytes, now, time.perf_counter() - start, np.empty(0, np.bool_))
            self._all = known
        return known

    def _count(self, holder: str, now: float, period_s: float) -> _Count:
        known = self._held.pop(holder, None)
        if known is None or len(known.rows) < self._table.rows or known.is_old(now, period_s):
            start = time.perf_counter()
            held = np.zeros(self._table.rows, np.bool_)
            for rows in self._leases.rows_of(holder):
                held[rows] = True
            nbytes = self._bytes_of(np.flatnonzero(held))
            known = _Count(nbytes, now, time.perf_counter() - start, held)
        while len(self._held) >= COUNTED_MAX:
            del self._held[next(iter(self._held))]
        self._held[holder] = known
        return known

    def _bytes_of(self, rows: NDArray[np.int32] | NDArray[np.intp]) -> int:
        return int(self._table.slot_bytes[rows].sum(dtype=np.int64))
