"""Residency: the life of a block's row and of the slots that it holds.

pending -> sealing -> present -> gone. Owns what may be evicted and in which order, so that
presence stays prefix-closed: only a leaf leaves, and a corrupt block takes its descendants along.
A row whose block has left while someone still reads it is DEAD and keeps its slots until then.
Needs the store's lock; does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from dualpath.kvstore.block_columns import BlockColumns
from dualpath.kvstore.block_events import BlockEvents
from dualpath.kvstore.block_table import GONE, NO_ROW, BlockTable, RowState
from dualpath.kvstore.catalog import Catalog, NamespaceEntry
from dualpath.kvstore.dram_tier import DramTier
from dualpath.kvstore.eviction import EvictionPolicy, VictimQueue
from dualpath.kvstore.segment import SegmentGeometry
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.kvstore.store_api import MissReason, Tier
from dualpath.kvstore.table_image import fill_table
from numpy.typing import NDArray

_FOREIGN_EVICTIONS_MAX = 4096
"""Most blocks of other size classes that one allocation may evict."""

OnDelete = Callable[[bytes, int, tuple[int, int], bool], None]
"""(key, generation, place, erase): the durable record must go before the place is written again;
with `erase` the header beside the data, too."""


class Residency:
    """See the module docstring. `clock` rises with every use of a block."""

    def __init__(
        self,
        table: BlockTable,
        catalog: Catalog,
        dram: DramTier,
        ssd: SsdTier,
        policy: EvictionPolicy,
        on_delete: OnDelete,
        events: BlockEvents,
    ) -> None:
        self._table = table
        self._catalog = catalog
        self._dram = dram
        self._ssd = ssd
        self._policy = policy
        self._on_delete = on_delete
        self._events = events
        self._ssd_queues: dict[int, VictimQueue] = {}
        self._dram_queues: dict[tuple[int, bool], VictimQueue] = {}
        self.clock = 0
        self.owners: dict[int, str] = {}
        self.dirty_bytes = 0
        self.evicted = dict.fromkeys(Tier, 0)
        self.corrupt_blocks = 0

    def touch(self, rows: NDArray[np.int32] | int) -> None:
        """Note a use."""
        self.clock += 1
        self._table.used[rows] = self.clock

    def reserve(self, entry: NamespaceEntry, block_hash: bytes, parent: int, owner: str) -> int:
        """A PENDING row with a slot on SSD and one in DRAM; NO_ROW if there is no space."""
        table = self._table
        slot_bytes = entry.layout.slot_bytes
        # Linked first: a parent with a child is not a victim.
        row = table.add(entry.index, block_hash, parent, slot_bytes)
        offset = self.take_dram(slot_bytes, for_write=True)
        table.dram[row] = offset
        place = self._take_ssd(slot_bytes) if offset >= 0 else None
        if place is None:
            self._free_row(row)
            return NO_ROW
        table.segment[row], table.slot[row] = place
        entry.pending[block_hash] = row
        self.owners[row] = owner
        return row

    def publish(
        self, row: int, generation: int, checksums: tuple[int, ...], *, dirty: bool
    ) -> None:
        """A sealed row becomes visible; all its chunks are in DRAM."""
        table, entry = self._table, self._catalog.entry_of(row)
        block_hash = table.hash_of(row)
        self.hide_pending(row)
        self.owners.pop(row, None)
        self._catalog.publish(row)
        table.state[row] = RowState.PRESENT
        table.generation[row] = generation
        table.checksum_row[row] = entry.pool.put(checksums)
        table.filled[row] = (1 << entry.layout.chunk_count) - 1
        table.resident[row] = True
        self.set_dirty(row, dirty)
        self._catalog.forget_removal(row)
        self.touch(row)
        self._events.stored(entry.id, block_hash, self._parent_hash(row))

    def restore(self, columns: BlockColumns) -> None:
        """Like `publish`, for all blocks that were found on SSD at opening."""
        fill_table(self._table, self._catalog, columns)
        self.clock = int(columns.used.max()) if len(columns) else 0

    def set_dirty(self, row: int, dirty: bool) -> None:
        """Whether the block has still to be written to SSD."""
        if bool(self._table.dirty[row]) != dirty:
            nbytes = int(self._table.slot_bytes[row])
            self.dirty_bytes += nbytes if dirty else -nbytes
            self._table.dirty[row] = dirty

    def drop_pending(self, row: int) -> None:
        """A reserved or sealing row is given up; its children can never be published."""
        self.hide_pending(row)
        for child in list(self._table.children(row)):
            self._table.unlink(child, GONE)
        self._table.state[row] = RowState.DEAD
        self.collect(row)

    def hide_pending(self, row: int) -> None:
        """Others may reserve the same block from now on; the row keeps its slots."""
        pending = self._catalog.entry_of(row).pending
        block_hash = self._table.hash_of(row)
        if pending.get(block_hash) == row:
            del pending[block_hash]

    def drop(self, row: int, reason: MissReason, *, told_until: int = -1) -> int:
        """A present block leaves with its descendants. Return how many left. Those of a generation
        up to `told_until` have no event of their own: all were told at once."""
        order = [row]
        for at in order:
            for child in list(self._table.children(at)):
                if self._table.state[child] == RowState.PRESENT:
                    order.append(child)
                else:
                    self._table.unlink(child, GONE)
        for gone in reversed(order):
            self._leave(gone, reason, told=int(self._table.generation[gone]) <= told_until)
        return len(order)

    def collect(self, row: int) -> None:
        """Free a DEAD row once nobody uses it."""
        table = self._table
        if table.state[row] == RowState.DEAD and table.pins[row] == 0 and table.leases[row] == 0:
            self._free_row(row)

    def unlease(self, rows: NDArray[np.int32]) -> None:
        """A lease on these rows has ended."""
        self._table.leases[rows] -= 1
        for row in rows[self._table.state[rows] == RowState.DEAD].tolist():
            self.collect(row)

    def unpin(self, row: int) -> None:
        """A reader or writer of the row's slots is done."""
        self._table.pins[row] -= 1
        self.collect(row)

    def unpin_rows(self, rows: NDArray[np.int32]) -> None:
        """As `unpin`, of rows that are all different."""
        self._table.pins[rows] -= 1
        for row in rows[self._table.state[rows] == RowState.DEAD].tolist():
            self.collect(row)

    def unpin_many(self, rows: NDArray[np.int32]) -> None:
        """`unpin` each; a row may occur more than once."""
        table = self._table
        np.subtract.at(table.pins, rows, 1)
        for row in np.unique(rows[table.state[rows] == RowState.DEAD]).tolist():
            self.collect(row)

    def take_dram(self, slot_bytes: int, *, for_write: bool) -> int:
        """Offset of a DRAM slot, demoting clean blocks (for a write also leased ones: they stay
        readable from SSD); -1 if there is none."""
        slots = self._dram.slots
        offset = slots.take(slot_bytes)
        if offset >= 0 or slot_bytes > slots.capacity_bytes:
            return offset
        for leased in (False, True) if for_write else (False,):
            for size in (slot_bytes, 0):
                queue = self._dram_queue(size, leased)
                while (row := queue.next(self._table.used)) >= 0:
                    self.evicted[Tier.DRAM] += 1
                    self._free_dram(row)
                    offset = slots.take(slot_bytes)
                    if offset >= 0:
                        return offset
        return -1

    def _take_ssd(self, slot_bytes: int) -> tuple[int, int] | None:
        if SegmentGeometry(slot_bytes, 1).file_bytes > self._ssd.capacity_bytes:
            return None
        foreign = 0
        while True:
            place = self._ssd.take(slot_bytes)
            if place is not None:
                return place
            row = self._ssd_queue(slot_bytes).next(self._table.used)
            if row < 0 and foreign < _FOREIGN_EVICTIONS_MAX:
                foreign += 1
                row = self._ssd_queue(0).next(self._table.used)
            if row < 0:
                return None
            self._evict(row)

    def _evict(self, row: int) -> None:
        parent = int(self._table.parent[row])
        size = int(self._table.slot_bytes[row])
        self.evicted[Tier.SSD] += 1
        self._leave(row, MissReason.EVICTED)
        if parent >= 0:
            for queue in (self._ssd_queue(size), self._ssd_queue(0)):
                queue.offer(parent, self._table.used)

    def _leave(self, row: int, reason: MissReason, *, told: bool = False) -> None:
        table, entry = self._table, self._catalog.entry_of(row)
        self._catalog.withdraw(row)
        self._catalog.remember(row, reason)
        if not told:
            self._events.removed(entry.id, table.hash_of(row), self._parent_hash(row), reason)
        if reason is MissReason.CORRUPT:
            self.corrupt_blocks += 1
        table.unlink(row)
        if not table.dirty[row]:
            place = int(table.segment[row]), int(table.slot[row])
            erase = reason is MissReason.INVALIDATED
            self._on_delete(self._catalog.key_of(row), int(table.generation[row]), place, erase)
        self.set_dirty(row, False)
        table.state[row] = RowState.DEAD
        self.collect(row)

    def _parent_hash(self, row: int) -> bytes:
        parent = int(self._table.parent[row])
        return self._table.hash_of(parent) if parent >= 0 else b""

    def _free_dram(self, row: int) -> None:
        self._dram.slots.give(int(self._table.dram[row]))
        self._table.dram[row] = -1
        self._table.filled[row] = 0
        self._table.resident[row] = False

    def _free_row(self, row: int) -> None:
        table = self._table
        if table.dram[row] >= 0:
            self._free_dram(row)
        if table.segment[row] >= 0:
            self._ssd.give(int(table.segment[row]), int(table.slot[row]))
            table.segment[row] = table.slot[row] = -1
        if table.checksum_row[row] >= 0:
            self._catalog.entry_of(row).pool.free(int(table.checksum_row[row]))
            table.checksum_row[row] = -1
        self.owners.pop(row, None)
        table.free(row)

    def _ssd_queue(self, slot_bytes: int) -> VictimQueue:
        queue = self._ssd_queues.get(slot_bytes)
        if queue is None:
            table = self._table

            def candidates() -> NDArray[np.int64]:
                mask = (table.state == RowState.PRESENT) & (table.first_child == NO_ROW)
                mask &= (table.leases == 0) & (table.pins == 0) & ~table.dirty
                if slot_bytes:
                    mask &= table.slot_bytes == slot_bytes
                return np.flatnonzero(mask)

            def allowed(row: int) -> bool:
                return bool(
                    table.state[row] == RowState.PRESENT
                    and table.first_child[row] == NO_ROW
                    and table.leases[row] == 0
                    and table.pins[row] == 0
                    and not table.dirty[row]
                    and slot_bytes in (0, table.slot_bytes[row])
                )

            queue = VictimQueue(self._policy, candidates, allowed)
            self._ssd_queues[slot_bytes] = queue
        return queue

    def _dram_queue(self, slot_bytes: int, leased: bool) -> VictimQueue:
        queue = self._dram_queues.get((slot_bytes, leased))
        if queue is None:
            table = self._table

            def candidates() -> NDArray[np.int64]:
                mask = (table.state == RowState.PRESENT) & (table.dram >= 0)
                mask &= (table.pins == 0) & ~table.dirty
                if not leased:
                    mask &= table.leases == 0
                if slot_bytes:
                    mask &= table.slot_bytes == slot_bytes
                return np.flatnonzero(mask)

            def allowed(row: int) -> bool:
                return bool(
                    table.state[row] == RowState.PRESENT
                    and table.dram[row] >= 0
                    and table.pins[row] == 0
                    and not table.dirty[row]
                    and (leased or table.leases[row] == 0)
                    and slot_bytes in (0, table.slot_bytes[row])
                )

            queue = VictimQueue(self._policy, candidates, allowed)
            self._dram_queues[(slot_bytes, leased)] = queue
        return queue
