"""Residency: the life of a block's row and of the slots that it holds.

pending -> sealing -> present -> gone. Presence stays prefix-closed: only a leaf makes way, and a
corrupt block takes its descendants along. A row whose block has left while someone still reads it
is DEAD and keeps its slots until then. Who makes way is decided by `SsdSpace` and `DramSpace`; this
tells them what happens to a row, above all what kept it and is over. Needs the store's lock; does
no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from dualpath.kvstore.block_columns import BlockColumns
from dualpath.kvstore.block_events import BlockEvents
from dualpath.kvstore.block_table import GONE, NO_ROW, BlockTable, RowState
from dualpath.kvstore.catalog import Catalog, NamespaceEntry
from dualpath.kvstore.dram_space import NO_OFFSET, DramSpace
from dualpath.kvstore.dram_tier import DramTier
from dualpath.kvstore.eviction import CHAIN_CHILDREN_MAX
from dualpath.kvstore.eviction_choice import new_policy
from dualpath.kvstore.ssd_space import SsdSpace
from dualpath.kvstore.ssd_tier import SsdTier
from dualpath.kvstore.store_api import MissReason, ReserveStatus, Tier
from dualpath.kvstore.table_image import fill_table
from dualpath.kvstore.tenant_limits import TenantLimits
from dualpath.kvstore.tenant_shares import TenantShares
from numpy.typing import NDArray

OnDelete = Callable[[bytes, int, tuple[int, int]], None]
"""(key, generation, place): the durable record must go before the place is written again."""


class Residency:
    """See the module docstring. `policy` names the eviction policy of both tiers, `tenants` have
    quotas. `clock` gives seconds; `self.clock` rises with every use of a block."""

    def __init__(
        self,
        table: BlockTable,
        catalog: Catalog,
        dram: DramTier,
        ssd: SsdTier,
        on_delete: OnDelete,
        events: BlockEvents,
        *,
        policy: str,
        tenants: Sequence[TenantLimits],
        clock: Callable[[], float],
    ) -> None:
        self._table = table
        self._catalog = catalog
        self._on_delete = on_delete
        self._events = events
        self._seconds = clock
        # A second after all that is at rest in the columns: 0 there means never.
        self._opened = clock() - 1
        dram_shares = TenantShares(
            {each.tenant: each.dram_bytes for each in tenants if each.dram_bytes}
        )
        ssd_shares = TenantShares(
            {each.tenant: each.disk_bytes for each in tenants if each.disk_bytes}
        )
        self.dram = DramSpace(table, catalog, dram, new_policy(policy), dram_shares)
        self.ssd = SsdSpace(
            table, catalog, ssd, new_policy(policy), ssd_shares, self.evict, self.now_s
        )
        self.clock = 0
        self.owners: dict[int, str] = {}
        self.dirty_bytes = 0
        self.corrupt_blocks = 0

    @property
    def evicted(self) -> Mapping[Tier, int]:
        """Blocks that made way on SSD, and copies that did in DRAM."""
        return {Tier.DRAM: self.dram.demoted, Tier.SSD: self.ssd.evicted}

    def now_s(self) -> int:
        """Whole seconds since opening, from 1 on: the scale of `used_s` and `retain_until`."""
        return int(self._seconds() - self._opened)

    def touch(self, rows: NDArray[np.integer]) -> None:
        """Note a use of blocks of one namespace, parents before children."""
        self.clock += 1
        self._table.used[rows] = self.clock
        self._table.used_s[rows] = self.now_s()
        self.ssd.order.policy.hit(rows)
        self.dram.order.policy.hit(rows)

    def reserve(
        self, entry: NamespaceEntry, block_hash: bytes, parent: int, owner: str
    ) -> int | ReserveStatus:
        """A PENDING row with a slot on SSD and one in DRAM; FULL or QUOTA if there is no space."""
        table = self._table
        # Linked first: a parent with a child is not a victim.
        row = table.add(entry.index, block_hash, parent, entry.layout.slot_bytes)
        if parent != NO_ROW:
            self.ssd.order.policy.park(parent)
        table.dram[row] = offset = self.dram.take(entry, for_write=True)
        place = self.ssd.take(entry) if offset != NO_OFFSET else ReserveStatus.FULL
        if isinstance(place, ReserveStatus):
            self._free_row(row)
            return place
        table.segment[row], table.slot[row] = place
        entry.pending[block_hash] = row
        self.owners[row] = owner
        return row

    def relocate(self, row: int) -> tuple[int, int] | None:
        """Another (segment, slot) for a row that is not on SSD yet; None if there is none."""
        table = self._table
        place = self.ssd.take(self._catalog.entry_of(row))
        if isinstance(place, ReserveStatus):
            return None
        self.ssd.give(row)
        table.segment[row], table.slot[row] = place
        return place

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
        self.clock += 1
        table.used[row] = self.clock
        table.used_s[row] = self.now_s()
        key, extends = table.fingerprint(row), table.extended(row, CHAIN_CHILDREN_MAX)
        if extends != NO_ROW and table.leases[extends]:
            # In use right now: its use is noted only when the lease ends.
            self.ssd.order.policy.hit(np.array([extends], np.int32))
        self.ssd.enter(row, key, extends=extends)
        self.dram.enter(row, key, extends=extends)
        self._events.stored(entry.id, block_hash, self._parent_hash(row))

    def restore(self, columns: BlockColumns) -> None:
        """Like `publish`, for all blocks that were found on SSD at opening."""
        fill_table(self._table, self._catalog, columns)
        self.clock = int(columns.used.max()) if len(columns) else 0
        self._table.used_s[: len(columns)] = self.now_s()
        # Of what was used together the deepest goes first: it was sealed last.
        self.ssd.fill(np.lexsort((-columns.generations, columns.used)).astype(np.int32))

    def set_dirty(self, row: int, dirty: bool) -> None:
        """Whether the block has still to be written to SSD."""
        if bool(self._table.dirty[row]) != dirty:
            nbytes = int(self._table.slot_bytes[row])
            self.dirty_bytes += nbytes if dirty else -nbytes
            self._table.dirty[row] = dirty
            if not dirty:
                self._settle(row)

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
        at = rows.astype(np.intp)  # faster than shorter integers
        self._table.leases[at] -= 1
        self.settle_all(at)

    def unpin(self, row: int) -> None:
        """A reader or writer of the row's slots is done."""
        self._table.pins[row] -= 1
        self._settle(row)
        self.collect(row)

    def unpin_rows(self, rows: NDArray[np.integer]) -> None:
        """As `unpin`, of rows that are all different."""
        self._table.pins[rows] -= 1
        self.settle_all(rows)

    def promote(self, row: int) -> bool:
        """Give a present block a DRAM slot, to be filled; False if no colder copy may make way."""
        table, entry = self._table, self._catalog.entry_of(row)
        offset = self.dram.take(entry, for_write=False)
        if offset == NO_OFFSET:
            return False
        table.dram[row] = offset
        extends = table.extended(row, CHAIN_CHILDREN_MAX)
        self.dram.enter(row, table.fingerprint(row), extends=extends)
        return True

    def evict(self, row: int, reason: MissReason) -> None:
        """A leaf makes way, or has expired."""
        self._leave(row, reason)

    def orphan(self, row: int) -> None:
        """A pending row can not be published any more."""
        above = int(self._table.parent[row])
        self._table.unlink(row, GONE)
        if above >= 0:
            self.ssd.order.settle(above)

    def _settle(self, row: int) -> None:
        """Something that kept the row from leaving, or its copy, may be over."""
        self.ssd.order.settle(row)
        self.dram.order.settle(row)

    def settle_all(self, rows: NDArray[np.integer]) -> None:
        """Something that kept these rows, or their copies, may be over; all different. Those that
        are DEAD may be collected."""
        table = self._table
        self.ssd.order.settle_all(rows[table.first_child.take(rows) == NO_ROW])
        self.dram.order.settle_all(rows)
        for row in rows[table.state.take(rows) == RowState.DEAD].tolist():
            self.collect(row)

    def _leave(self, row: int, reason: MissReason, *, told: bool = False) -> None:
        table, entry = self._table, self._catalog.entry_of(row)
        self._catalog.withdraw(row)
        self._catalog.remember(row, reason)
        if not told:
            self._events.removed(entry.id, table.hash_of(row), self._parent_hash(row), reason)
        if reason is MissReason.CORRUPT:
            self.corrupt_blocks += 1
        above = int(table.parent[row])
        table.unlink(row)
        makes_way = reason in (MissReason.EVICTED, MissReason.QUOTA)
        self.ssd.order.leave(row, key=table.fingerprint(row) if makes_way else 0)
        if above >= 0:
            self.ssd.order.settle(above, spent=bool(table.used[above] <= table.used[row]))
        if not table.dirty[row]:
            place = int(table.segment[row]), int(table.slot[row])
            self._on_delete(self._catalog.key_of(row), int(table.generation[row]), place)
        self.set_dirty(row, False)
        table.state[row] = RowState.DEAD
        self.collect(row)

    def _parent_hash(self, row: int) -> bytes:
        parent = int(self._table.parent[row])
        return self._table.hash_of(parent) if parent >= 0 else b""

    def _free_row(self, row: int) -> None:
        table = self._table
        if table.dram[row] >= 0:
            self.dram.free(row)
        if table.segment[row] >= 0:
            self.ssd.give(row)
        if table.checksum_row[row] >= 0:
            self._catalog.entry_of(row).pool.free(int(table.checksum_row[row]))
            table.checksum_row[row] = -1
        self.owners.pop(row, None)
        above = int(table.parent[row])
        table.free(row)
        if above >= 0:
            self.ssd.order.settle(above)
