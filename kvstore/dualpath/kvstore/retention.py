"""Retention: prefixes that should stay for a while, within a budget of bytes.

Soft: a retained block makes way only when nothing else may, so it never wedges the store. Granted
for a time, and only while the retained bytes stay within the budget and the tenant within his part
of it (as large as his part of the disk): what does not fit is not retained, and the caller is told
how much is. Renewed by asking again; a later end wins.

Owns which prefixes are retained, by their deepest hash, and the column `retain_until`. That list is
durable within about a second (`RETAINED`), with ends in wall-clock time, so that a retention
survives a restart; while the store is open, ends are on its own clock, which nobody sets. Needs the
store's lock, but for `save`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dualpath.kvstore import directory_format
from dualpath.kvstore.block_table import NO_ROW, BlockTable, RowState
from dualpath.kvstore.catalog import Catalog, NamespaceEntry
from dualpath.kvstore.directory_format import RetainedPrefix
from dualpath.kvstore.residency import Residency
from dualpath.transfer.errors import Corrupt, InvalidRequest, Overloaded
from numpy.typing import NDArray

RETENTION_S_MAX = 90 * 86400.0
PREFIXES_MAX = 4096
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _End:
    """When a prefix is retained no longer: `at_s` on the store's clock, and by the wall clock."""

    at_s: int
    unix_s: float


class RetentionTable:
    """See the module docstring. `wall_clock` gives seconds since 1970."""

    def __init__(
        self,
        root: Path,
        table: BlockTable,
        catalog: Catalog,
        residency: Residency,
        budget_bytes: int,
        capacity_bytes: int,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._root = root
        self._table = table
        self._catalog = catalog
        self._residency = residency
        self._budget_bytes = budget_bytes
        self._capacity_bytes = capacity_bytes
        self._wall_clock = wall_clock
        self._prefixes: dict[tuple[bytes, bytes], _End] = {}
        self._changed = False
        self._first_end_s = math.inf

    @property
    def retained_bytes(self) -> int:
        """Bytes of slots of blocks that are retained now."""
        return int(self._table.slot_bytes[self._retained()].sum(dtype=np.int64))

    def load(self) -> None:
        """Once, after the blocks: take up what was retained when the store was closed."""
        try:
            found = directory_format.read_retained(self._root)
        except Corrupt as error:
            _log.warning("%s; nothing is retained", error)
            found = ()
        now = self._wall_clock()
        for prefix in sorted(found, key=lambda each: -each.until_unix_s)[:PREFIXES_MAX]:
            entry = self._catalog.find(prefix.namespace_id)
            row = self._catalog.row_of(entry, prefix.hash) if entry else NO_ROW
            left_s = min(prefix.until_unix_s - now, RETENTION_S_MAX)
            if entry is not None and row != NO_ROW and left_s > 0:
                self._grant(entry, self._path(row), left_s)

    def retain(self, entry: NamespaceEntry, rows: NDArray[np.int32], retain_s: float) -> int:
        """Retain a prefix for a time (0: not any more); return how many leading blocks are.
        Raises InvalidRequest, Overloaded."""
        if not 0 <= retain_s <= RETENTION_S_MAX:
            raise InvalidRequest(f"retain_s must lie in 0..{RETENTION_S_MAX:.0f} s, not {retain_s}")
        if not len(rows):
            return 0
        if retain_s == 0:
            self._release(entry, rows)
            return 0
        if len(self._prefixes) >= PREFIXES_MAX:
            self.expire()
        if len(self._prefixes) >= PREFIXES_MAX:
            raise Overloaded(
                f"{PREFIXES_MAX} prefixes are retained; let some go first", retry_after_s=60.0
            )
        return self._grant(entry, rows, retain_s)

    def expire(self) -> None:
        """Forget what has ended: its blocks may make way like any others."""
        table, now_s = self._table, self._residency.now_s()
        if now_s < self._first_end_s:
            return
        ended = np.flatnonzero((table.retain_until > 0) & (table.retain_until <= now_s))
        table.retain_until[ended] = 0
        self._residency.settle_all(ended.astype(np.int32))
        left = table.retain_until[table.retain_until > 0]
        self._first_end_s = int(left.min()) if len(left) else math.inf
        for key in [key for key, end in self._prefixes.items() if end.at_s <= now_s]:
            del self._prefixes[key]
            self._changed = True

    def take_changes(self) -> tuple[RetainedPrefix, ...] | None:
        """What is to be saved now; None if nothing has changed."""
        if not self._changed:
            return None
        self._changed = False
        return tuple(RetainedPrefix(*key, end.unix_s) for key, end in self._prefixes.items())

    def save(self, prefixes: Sequence[RetainedPrefix]) -> None:
        """Make it durable; without the lock. A failure is logged: a retention is no promise."""
        try:
            directory_format.write_retained(self._root, prefixes)
        except OSError as error:
            _log.warning("what is retained could not be saved: %s", error)
            self._changed = True

    def _grant(self, entry: NamespaceEntry, rows: NDArray[np.int32], retain_s: float) -> int:
        table, now_s = self._table, self._residency.now_s()
        fresh = table.retain_until[rows] <= now_s
        room = self._room(entry) // entry.layout.slot_bytes
        # The leading blocks whose fresh ones fit.
        fit = int(np.searchsorted(np.cumsum(fresh), room, side="right"))
        rows = rows[:fit]
        if fit:
            until = now_s + math.ceil(retain_s)
            table.retain_until[rows] = np.maximum(table.retain_until[rows], until)
            self._first_end_s = min(self._first_end_s, until)
            key = entry.id, table.hash_of(int(rows[-1]))
            known = self._prefixes.get(key)
            if known is None or known.at_s < until:
                self._prefixes[key] = _End(until, self._wall_clock() + retain_s)
                self._changed = True
        return fit

    def _room(self, entry: NamespaceEntry) -> int:
        """Bytes that may still be retained for the namespace's tenant."""
        retained, shares = self._retained(), self._residency.ssd.shares
        sizes = self._table.slot_bytes[retained]
        room = self._budget_bytes - int(sizes.sum(dtype=np.int64))
        bucket = self._residency.ssd.bucket(entry)
        part = shares.share_bytes(bucket, self._capacity_bytes) / self._capacity_bytes
        buckets = self._catalog.by_number(self._residency.ssd.bucket)
        mine = sizes[buckets[self._table.namespace[retained]] == bucket]
        own_room = int(part * self._budget_bytes) - int(mine.sum(dtype=np.int64))
        return max(0, min(room, own_room))

    def _release(self, entry: NamespaceEntry, rows: NDArray[np.int32]) -> None:
        """Let the prefix go, but for what a longer or shorter one holds as well."""
        table = self._table
        if self._prefixes.pop((entry.id, table.hash_of(int(rows[-1]))), None) is None:
            return
        self._changed = True
        table.retain_until[rows] = 0
        for (namespace_id, block_hash), end in self._prefixes.items():
            row = self._catalog.row_of(entry, block_hash) if namespace_id == entry.id else NO_ROW
            if row != NO_ROW and end.at_s > self._residency.now_s():
                path = self._path(row)
                table.retain_until[path] = np.maximum(table.retain_until[path], end.at_s)
        self._residency.settle_all(rows)

    def _retained(self) -> NDArray[np.int64]:
        table = self._table
        retained = table.retain_until > self._residency.now_s()
        return np.flatnonzero(retained & (table.state == RowState.PRESENT))

    def _path(self, row: int) -> NDArray[np.int32]:
        """The rows from the root to this one."""
        path = []
        while row >= 0:
            path.append(row)
            row = int(self._table.parent[row])
        return np.array(path[::-1], np.int32)
